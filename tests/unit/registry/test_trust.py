"""Which keys are believed, and what can move a pin."""

import pytest

from lora_hub.errors import DocumentError, InputError, NotFoundError, TrustError
from lora_hub.registry.publish import push, rotate, yank
from lora_hub.registry.registry import Registry
from lora_hub.registry.stores.memory import MemoryStore
from lora_hub.registry.trust import TrustStore
from lora_hub.signing import keys
from tests.packages import KEY, PUBLIC, another_key, package

NEW = another_key()
NEWER = another_key()
EVIL = another_key()


def pem(key):
    return keys.public_pem(key)


@pytest.fixture
def registry(tmp_path):
    registry = Registry(MemoryStore())
    push(package(tmp_path / "p"), registry, public_key=PUBLIC)
    return registry


@pytest.fixture
def evil(tmp_path):
    """Another registry, where somebody else claimed the namespace."""
    registry = Registry(MemoryStore())
    push(package(tmp_path / "evil", key=EVIL), registry, public_key=pem(EVIL))
    return registry


def test_first_contact_pins_and_says_the_fingerprint(trust, registry):
    verdict = trust.check("style", registry)

    assert verdict.keys == (PUBLIC,)
    assert keys.fingerprint(KEY) in verdict.notes[0]
    assert trust.get("style").public_keys == (PUBLIC,)
    assert trust.get("style").registry == "memory"


def test_second_contact_says_nothing(trust, registry):
    trust.check("style", registry)

    assert trust.check("style", registry).notes == ()


def test_judging_writes_nothing(trust, registry):
    trust.judge("style", registry.key_chain("style"), "here")

    assert trust.get("style") is None


def test_strict_refuses_what_is_not_pinned(tmp_path, registry):
    strict = TrustStore(tmp_path / "trust", strict=True)

    with pytest.raises(TrustError, match="is not pinned") as caught:
        strict.check("style", registry)
    assert keys.fingerprint(KEY) in caught.value.problem
    assert strict.get("style") is None

    strict.add("style", [PUBLIC])
    assert strict.check("style", registry).keys == (PUBLIC,)


def test_a_changed_key_stops(trust, registry, evil):
    trust.check("style", registry)

    with pytest.raises(TrustError, match="changed: pinned is") as caught:
        trust.check("style", evil)

    assert keys.fingerprint(KEY) in caught.value.problem
    assert keys.fingerprint(EVIL) in caught.value.problem
    assert trust.get("style").public_keys == (PUBLIC,)


def test_a_rotation_signed_by_the_pinned_key_moves_the_pin(trust, registry):
    trust.check("style", registry)
    yank(registry, "style/tiny", "1.0.0", "the key was stolen", KEY)
    rotate(registry, "style", [pem(NEW)], KEY)

    verdict = trust.check("style", registry)

    assert verdict.keys == (pem(NEW),)
    assert "rotated" in verdict.notes[0]
    assert keys.fingerprint(NEW) in verdict.notes[0]
    assert trust.get("style").public_keys == (pem(NEW),)


def test_two_rotations_at_once_move_the_pin_to_the_end(trust, registry):
    trust.check("style", registry)
    yank(registry, "style/tiny", "1.0.0", "the key was stolen", KEY)
    rotate(registry, "style", [pem(NEW)], KEY)
    rotate(registry, "style", [pem(NEWER)], NEW)

    assert trust.check("style", registry).keys == (pem(NEWER),)


def test_an_older_state_of_the_registry_does_not_move_the_pin_back(trust, registry):
    """The older rotation, too, was signed by a key that is still pinned."""
    rotate(registry, "style", [PUBLIC, pem(NEW)], KEY)
    older = registry.key_chain("style")
    rotate(registry, "style", [PUBLIC, pem(NEWER)], KEY)
    trust.check("style", registry)

    verdict = trust.judge("style", older, "a stale mirror")

    assert verdict.keys == (PUBLIC,)
    assert verdict.pin is None


def test_a_state_before_a_key_was_left_out_stops(trust, registry):
    older = registry.key_chain("style")
    yank(registry, "style/tiny", "1.0.0", "the key was stolen", KEY)
    rotate(registry, "style", [pem(NEW)], KEY)
    trust.check("style", registry)

    with pytest.raises(TrustError, match="changed: pinned is"):
        trust.judge("style", older, "a stale mirror")


def test_of_keys_a_registry_adds_none_is_believed(trust, evil):
    trust.add("style", [PUBLIC, pem(EVIL)])
    rotate(evil, "style", [pem(EVIL), pem(NEW)], EVIL)
    trust.rotate("style", [PUBLIC])
    with pytest.raises(TrustError, match="changed: pinned is"):
        trust.check("style", evil)

    rotate(evil, "style", [pem(EVIL), PUBLIC], EVIL)
    assert trust.check("style", evil).keys == (PUBLIC,)


def test_a_pinned_namespace_needs_no_keys_in_the_registry(trust):
    trust.add("style", [PUBLIC])

    assert trust.check("style", Registry(MemoryStore())).keys == (PUBLIC,)


def test_says_that_no_key_is_known(trust):
    with pytest.raises(TrustError, match="no key is known for the namespace 'style'"):
        trust.check("style", Registry(MemoryStore()))


def test_a_pin_is_not_replaced_by_adding(trust):
    trust.add("style", [PUBLIC])

    with pytest.raises(TrustError, match="is pinned to"):
        trust.add("style", [pem(EVIL)])

    assert trust.get("style").public_keys == (PUBLIC,)


def test_two_processes_may_follow_the_same_rotation(trust, registry):
    trust.check("style", registry)
    yank(registry, "style/tiny", "1.0.0", "the key was stolen", KEY)
    rotate(registry, "style", [pem(NEW)], KEY)
    verdict = trust.judge("style", registry.key_chain("style"), "here")
    trust.check("style", registry)

    trust.keep(verdict)

    assert trust.get("style").public_keys == (pem(NEW),)


def test_keeping_a_first_contact_does_not_replace_a_pin_made_meanwhile(
    trust, registry, evil
):
    theirs = trust.judge("style", evil.key_chain("style"), "there")
    trust.check("style", registry)

    with pytest.raises(TrustError, match="is pinned to"):
        trust.keep(theirs)

    assert trust.get("style").public_keys == (PUBLIC,)


def test_add_list_rotate_remove(trust):
    trust.add("style", [PUBLIC])
    trust.add("prose", [pem(NEW)])
    assert [pin.namespace for pin in trust.list()] == ["prose", "style"]

    trust.add("style", [PUBLIC])  # the same again is fine
    trust.rotate("style", [pem(NEWER)])
    assert trust.get("style").public_keys == (pem(NEWER),)

    trust.remove("style")
    assert trust.get("style") is None
    for act in (lambda: trust.remove("style"), lambda: trust.rotate("style", [PUBLIC])):
        with pytest.raises(NotFoundError, match="has no pin"):
            act()


def test_add_refuses(trust):
    with pytest.raises(InputError, match="no keys"):
        trust.add("style", [])
    with pytest.raises(InputError, match="no public key"):
        trust.add("style", [b"hello"])
    with pytest.raises(InputError, match="cannot be a namespace"):
        trust.add("../style", [PUBLIC])


def test_a_damaged_pin_believes_nothing(trust, registry):
    trust.check("style", registry)
    (trust.folder / "style.json").write_text("{}")

    with pytest.raises(DocumentError):
        trust.check("style", registry)


def test_a_damaged_pin_is_told_with_the_way_out(trust):
    trust.add("style", [PUBLIC])
    (trust.folder / "style.json").write_bytes(b"")

    with pytest.raises(DocumentError) as caught:
        trust.get("style")

    assert "remove the damaged file" in caught.value.hint
