"""Push, yank and unyank: who may, and what stays as it was."""

import pytest

from lora_hub.errors import (
    AlreadyExists,
    InputError,
    IntegrityError,
    NotFoundError,
    TrustError,
)
from lora_hub.package.package import open_package
from lora_hub.registry.check import check
from lora_hub.registry.publish import push, rotate, unyank, yank
from lora_hub.registry.registry import Registry
from lora_hub.registry.stores.memory import MemoryStore
from lora_hub.registry.trust import TrustStore
from lora_hub.signing import keys
from tests.packages import KEY, PUBLIC, another_key, package, sign_folder


def contents(registry):
    return {path: registry.store.read(path) for path in registry.store.list("")}


def test_first_push_claims_the_namespace(registry, tmp_path):
    result = push(package(tmp_path / "p"), registry, public_key=PUBLIC)

    assert (result.name, result.version, result.seq) == ("style/tiny", "1.0.0", 1)
    assert not result.already
    assert registry.keys("style") == (PUBLIC,)


def test_same_bytes_again_change_nothing(registry, tmp_path):
    first = push(package(tmp_path / "p"), registry, public_key=PUBLIC)
    before = contents(registry)

    again = push(open_package(tmp_path / "p"), registry)

    assert again.already
    assert again.seq == first.seq
    assert contents(registry) == before


def test_same_bytes_at_a_fixed_time_make_the_same_registry(tmp_path, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1795392000")
    made = []
    for folder in ("one", "two"):
        registry = Registry(MemoryStore())
        push(package(tmp_path / folder / "tiny"), registry, public_key=PUBLIC)
        made.append(contents(registry))

    assert made[0] == made[1]


def test_a_version_does_not_change(registry, tmp_path):
    push(package(tmp_path / "p"), registry, public_key=PUBLIC)
    before = contents(registry)

    with pytest.raises(AlreadyExists, match="published with other bytes"):
        push(package(tmp_path / "q", seed=1), registry)

    assert contents(registry) == before


def test_a_new_namespace_needs_a_key(registry, tmp_path):
    with pytest.raises(TrustError, match="nobody has claimed the namespace 'style'"):
        push(package(tmp_path / "p"), registry)

    assert contents(registry) == {}


def test_a_new_namespace_takes_the_pinned_key(registry, tmp_path):
    trust = TrustStore(tmp_path / "trust", strict=False)
    trust.add("style", [PUBLIC])

    push(package(tmp_path / "p"), registry, trust=trust)

    assert registry.keys("style") == (PUBLIC,)


def test_a_stranger_cannot_publish_in_a_claimed_namespace(registry, tmp_path):
    push(package(tmp_path / "p"), registry, public_key=PUBLIC)
    stranger = another_key()
    foreign = package(tmp_path / "q", version="1.1.0", key=stranger)
    before = contents(registry)

    with pytest.raises(TrustError, match="signed with another key"):
        push(foreign, registry, public_key=keys.public_pem(stranger))

    assert contents(registry) == before


def test_an_unsigned_package_is_refused(registry, tmp_path):
    with pytest.raises(TrustError, match="not signed"):
        push(package(tmp_path / "p", key=None), registry, public_key=PUBLIC)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "README.md"])
def test_a_changed_file_is_refused(registry, tmp_path, name):
    made = package(tmp_path / "p")
    data = bytearray((tmp_path / "p" / name).read_bytes())
    data[-1] ^= 1
    (tmp_path / "p" / name).write_bytes(data)

    with pytest.raises(IntegrityError) as caught:
        push(made, registry, public_key=PUBLIC)

    assert caught.value.where.endswith(name)
    assert contents(registry) == {}


def test_an_added_file_is_refused(registry, tmp_path):
    package(tmp_path / "p")
    (tmp_path / "p/notes.txt").write_text("hello")
    sign_folder(tmp_path / "p")  # even when it is signed

    with pytest.raises(IntegrityError, match="was added"):
        push(open_package(tmp_path / "p"), registry, public_key=PUBLIC)


def test_of_two_claims_the_first_wins(tmp_path):
    """The other publisher's claim arrives between our look and our claim."""
    other = another_key()
    theirs = package(tmp_path / "theirs", name="style/theirs", key=other)

    class Late(MemoryStore):
        def write(self, path, chunks, *, if_absent):
            if path.startswith("keys/") and not self.raced:
                self.raced = True
                push(theirs, Registry(self), public_key=keys.public_pem(other))
            return super().write(path, chunks, if_absent=if_absent)

    store = Late()
    store.raced = False

    with pytest.raises(TrustError, match="signed with another key"):
        push(package(tmp_path / "ours"), Registry(store), public_key=PUBLIC)

    assert Registry(store).keys("style") == (keys.public_pem(other),)
    assert list(Registry(store).names()) == ["style/theirs"]


def test_a_lost_race_for_a_number_takes_the_next(tmp_path):
    theirs = package(tmp_path / "theirs", version="2.0.0")

    class Late(MemoryStore):
        def write(self, path, chunks, *, if_absent):
            if path == "index/style/tiny/000001.json" and not self.raced:
                self.raced = True
                push(theirs, Registry(self))
            return super().write(path, chunks, if_absent=if_absent)

    store = Late()
    store.raced = False

    result = push(package(tmp_path / "ours"), Registry(store), public_key=PUBLIC)

    assert result.seq == 2
    versions = [entry.version for entry in Registry(store).versions("style/tiny")]
    assert versions == ["1.0.0", "2.0.0"]


def test_yank_says_whether_it_did_anything(registry, tmp_path):
    push(package(tmp_path / "p"), registry, public_key=PUBLIC)

    assert yank(registry, "style/tiny", "1.0.0", "broken", KEY)
    assert not yank(registry, "style/tiny", "1.0.0", "still broken", KEY)
    assert registry.versions("style/tiny")[0].yanked == "broken"
    assert unyank(registry, "style/tiny", "1.0.0", KEY)
    assert not unyank(registry, "style/tiny", "1.0.0", KEY)
    assert registry.versions("style/tiny")[0].yanked is None


def test_yank_refuses(registry, tmp_path):
    push(package(tmp_path / "p"), registry, public_key=PUBLIC)

    with pytest.raises(NotFoundError, match=r"1\.1\.0 was never published") as caught:
        yank(registry, "style/tiny", "1.1.0", "broken", KEY)
    assert caught.value.hint == "versions: 1.0.0"
    with pytest.raises(TrustError, match="does not sign for the namespace 'style'"):
        yank(registry, "style/tiny", "1.0.0", "broken", another_key())
    with pytest.raises(InputError, match="0 characters"):
        yank(registry, "style/tiny", "1.0.0", "", KEY)


def test_rotate_refuses_no_keys(registry, tmp_path):
    push(package(tmp_path / "p"), registry, public_key=PUBLIC)

    with pytest.raises(InputError, match="no keys"):
        rotate(registry, "style", [], KEY)


def test_after_rotation_the_new_key_publishes_and_the_old_does_not(registry, tmp_path):
    push(package(tmp_path / "p"), registry, public_key=PUBLIC)
    yank(registry, "style/tiny", "1.0.0", "the key was stolen", KEY)
    new = another_key()
    rotate(registry, "style", [keys.public_pem(new)], KEY)

    push(package(tmp_path / "q", version="1.1.0", key=new), registry)

    with pytest.raises(TrustError, match="signed with another key"):
        push(package(tmp_path / "r", version="1.2.0"), registry)


def problems_of(registry):
    """What `check` says of the versions; the registry here has no config.json."""
    return [problem for problem in check(registry) if problem.where != "config.json"]


def test_a_rotation_that_would_orphan_a_version_is_refused(registry, tmp_path):
    push(package(tmp_path / "p"), registry, public_key=PUBLIC)
    new = keys.public_pem(another_key())

    with pytest.raises(InputError, match="signed with a key that is left out"):
        rotate(registry, "style", [new], KEY)

    assert registry.keys("style") == (PUBLIC,)
    rotate(registry, "style", [new, PUBLIC], KEY)  # a key that only retires is kept
    assert problems_of(registry) == []


def test_versions_withdrawn_before_their_key_left_are_no_problem(registry, tmp_path):
    push(package(tmp_path / "p"), registry, public_key=PUBLIC)
    yank(registry, "style/tiny", "1.0.0", "the key was stolen", KEY)

    rotate(registry, "style", [keys.public_pem(another_key())], KEY)

    assert problems_of(registry) == []


def test_a_reason_is_one_line(registry, tmp_path):
    push(package(tmp_path / "p"), registry, public_key=PUBLIC)

    with pytest.raises(InputError, match="line break"):
        yank(registry, "style/tiny", "1.0.0", "broken\nstyle/tiny is fine", KEY)
