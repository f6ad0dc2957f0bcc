"""A registry's own files: what makes one, and how a broken one is told."""

import json

import msgspec
import pytest

from lora_hub import digest
from lora_hub.errors import (
    DocumentError,
    InputError,
    IntegrityError,
    NotFoundError,
    ReferenceSyntaxError,
    StoreError,
    TrustError,
)
from lora_hub.registry import chain, documents
from lora_hub.registry.publish import push, rotate, unyank, yank
from lora_hub.registry.registry import Registry, init, open_registry
from lora_hub.registry.stores.memory import MemoryStore
from lora_hub.signing import keys
from tests.packages import KEY, PUBLIC, another_key, package


@pytest.fixture
def full(registry, tmp_path):
    """A registry with three versions of style/tiny, the second withdrawn, and one other."""
    for version in ("1.0.0", "1.1.0", "2.0.0-rc.1"):
        push(package(tmp_path / version, version=version), registry, public_key=PUBLIC)
    push(package(tmp_path / "other", name="style/other"), registry)
    yank(registry, "style/tiny", "1.1.0", "trained on the wrong text", KEY)
    return registry


def test_init_makes_a_registry_that_opens(tmp_path):
    made = init(tmp_path / "registry", "examples")

    assert open_registry(tmp_path / "registry").config == made.config
    assert made.config.name == "examples"


def test_init_leaves_a_registry_as_it_is(tmp_path):
    init(tmp_path, "examples")
    before = (tmp_path / "config.json").read_bytes()

    init(tmp_path, "examples")

    assert (tmp_path / "config.json").read_bytes() == before


def test_init_refuses_a_registry_of_another_name(tmp_path):
    init(tmp_path, "examples")

    with pytest.raises(InputError, match="a registry already, of the name 'examples'"):
        init(tmp_path, "others")


def test_init_refuses_a_name_that_is_none(tmp_path):
    with pytest.raises(InputError, match="cannot name a registry"):
        init(tmp_path, "My Registry")


def test_open_says_what_is_no_registry(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")

    with pytest.raises(NotFoundError, match="no such folder") as caught:
        open_registry(tmp_path / "absent")
    assert "lorahub registry init" in caught.value.hint
    with pytest.raises(NotFoundError, match="holds no registry"):
        open_registry(tmp_path / "empty")
    with pytest.raises(NotFoundError, match="no such folder"):
        open_registry(tmp_path / "file")
    with pytest.raises(InputError, match="s3:// are not supported"):
        open_registry("s3://bucket/registry")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "not JSON"),
        ('{"name":"ex"}', "missing required field `schema`"),
        ('{"name":"ex","schema":"lorahub.registry/2"}', "lorahub.registry/2"),
        ('{ "name":"ex","schema":"lorahub.registry/1"}', "canonical"),
    ],
)
def test_open_refuses_another_config(tmp_path, content, problem):
    (tmp_path / "config.json").write_text(content)

    with pytest.raises(DocumentError, match=problem):
        open_registry(tmp_path)


def test_knows_its_names_and_namespaces(full):
    assert list(full.names()) == ["style/other", "style/tiny"]
    assert list(full.namespaces()) == ["style"]


def test_versions_come_in_order_with_what_was_withdrawn(full):
    versions = [(entry.version, entry.yanked) for entry in full.versions("style/tiny")]

    assert versions == [
        ("1.0.0", None),
        ("1.1.0", "trained on the wrong text"),
        ("2.0.0-rc.1", None),
    ]


def test_versions_come_in_order_of_numbers_not_of_pushes(registry, tmp_path):
    for version in ("1.10.0", "1.9.0", "1.10.0-rc.2", "1.10.0-rc.10"):
        push(package(tmp_path / version, version=version), registry, public_key=PUBLIC)

    found = [entry.version for entry in registry.versions("style/tiny")]

    assert found == ["1.9.0", "1.10.0-rc.2", "1.10.0-rc.10", "1.10.0"]


def test_unyank_brings_a_version_back(full):
    assert unyank(full, "style/tiny", "1.1.0", KEY)

    assert [entry.yanked for entry in full.versions("style/tiny")] == [None] * 3


def test_guesses_what_a_misspelt_name_meant(full):
    with pytest.raises(NotFoundError, match="nothing of the name style/tinny") as caught:
        full.versions("style/tinny")

    assert caught.value.hint == "did you mean style/tiny?"


def test_says_what_it_has_when_nothing_is_near(full, registry):
    with pytest.raises(NotFoundError) as caught:
        full.versions("zz/qqqqqqqqq")
    assert caught.value.hint == "it has style/other, style/tiny"

    with pytest.raises(NotFoundError) as caught:
        Registry(MemoryStore()).versions("zz/qq")
    assert caught.value.hint == "the registry is empty"


@pytest.mark.parametrize("name", ["../etc", "a/b", "style/../x", "Style/tiny", "style"])
def test_a_name_cannot_lead_anywhere_else(registry, name):
    with pytest.raises(ReferenceSyntaxError):
        registry.events(name)


def test_blobs_are_compared_with_their_names(registry):
    name = registry.put_blob(b"content")
    path = f"blobs/sha256/{name[7:9]}/{name[7:]}"
    assert registry.blob(name, max_bytes=7) == b"content"

    registry.store.write(path, [b"another"], if_absent=False)

    with pytest.raises(IntegrityError, match=r"expected sha256:"):
        registry.blob(name, max_bytes=7)
    with pytest.raises(IntegrityError, match="at most 3"):
        registry.blob(name, max_bytes=3)
    with pytest.raises(NotFoundError):
        registry.blob(digest.of_bytes(b"absent"), max_bytes=7)


def test_putting_a_blob_again_mends_a_damaged_one(registry):
    name = registry.put_blob(b"content")
    registry.store.write(
        f"blobs/sha256/{name[7:9]}/{name[7:]}", [b"damaged"], if_absent=False
    )

    registry.put_blob(b"content")

    assert registry.blob(name, max_bytes=7) == b"content"


def rewrite(registry, path, change):
    """Change the event in the file and write it in canonical form."""
    value = json.loads(registry.store.read(path))
    change(value)
    registry.store.write(path, [documents.canonical.encode(value)], if_absent=False)


def test_a_missing_event_is_told(full):
    full.store.delete("index/style/tiny/000002.json")

    with pytest.raises(IntegrityError, match="the event is missing") as caught:
        full.events("style/tiny")

    assert caught.value.where.endswith("000002.json")


def test_a_changed_event_is_told(full):
    rewrite(full, "index/style/tiny/000001.json", lambda event: event.update(max_rank=1))

    with pytest.raises(IntegrityError, match="does not follow") as caught:
        full.events("style/tiny")

    assert caught.value.where.endswith("000002.json")


def test_events_in_another_order_are_told(full):
    one, two = (full.store.read(f"index/style/tiny/00000{n}.json") for n in (1, 2))
    full.store.write("index/style/tiny/000001.json", [two], if_absent=False)
    full.store.write("index/style/tiny/000002.json", [one], if_absent=False)

    with pytest.raises(IntegrityError, match="does not follow"):
        full.events("style/tiny")


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "not JSON"),
        (b"{}", "missing required field `event`"),
        (b'{"event":"burn","v":1}', "'burn'"),
        (b'{"event":"yank"}\n', "canonical"),
    ],
)
def test_an_unreadable_event_is_told(registry, data, problem):
    registry.store.write("index/style/tiny/000001.json", [data], if_absent=True)

    with pytest.raises(IntegrityError, match=problem):
        registry.events("style/tiny")


def test_an_event_of_another_name_is_told(full):
    event = full.store.read("index/style/other/000001.json")
    full.store.write("index/style/new/000001.json", [event], if_absent=True)

    with pytest.raises(IntegrityError, match="one of style/other"):
        full.events("style/new")


def test_a_version_published_twice_is_told(full):
    last = full.store.read("index/style/tiny/000004.json")
    again = json.loads(full.store.read("index/style/tiny/000001.json"))
    again |= {"seq": 5, "prev": digest.of_bytes(last)}
    full.store.write(
        "index/style/tiny/000005.json", [documents.canonical.encode(again)], if_absent=True
    )

    with pytest.raises(IntegrityError, match=r"1\.0\.0 was published twice"):
        full.events("style/tiny")


def test_a_withdrawal_nobody_signed_is_told(full):
    rewrite(
        full, "index/style/tiny/000004.json", lambda event: event.update(reason="forged")
    )

    with pytest.raises(TrustError, match="not one over it"):
        full.versions("style/tiny")


def test_a_withdrawal_by_a_stranger_is_told(full):
    stranger = another_key()

    def change(event):
        event["signer"] = keys.hint(stranger)

    rewrite(full, "index/style/tiny/000004.json", change)

    with pytest.raises(TrustError, match="no key of the namespace"):
        full.versions("style/tiny")


def withdraw_all(registry):
    for name in registry.names():
        for entry in registry.versions(name):
            yank(registry, name, entry.version, "the key was stolen", KEY)


def test_a_withdrawal_outlives_the_key_that_signed_it(full):
    withdraw_all(full)
    rotate(full, "style", [keys.public_pem(another_key())], KEY)

    assert full.versions("style/tiny")[1].yanked


def test_rotation_hands_the_namespace_to_the_new_keys(full):
    new = another_key()

    withdraw_all(full)
    rotate(full, "style", [keys.public_pem(new)], KEY)

    assert full.keys("style") == (keys.public_pem(new),)
    with pytest.raises(TrustError, match="does not sign for the namespace"):
        rotate(full, "style", [PUBLIC], KEY)


def test_keys_changed_without_a_signature_are_told(full):
    rotate(full, "style", [PUBLIC], KEY)
    evil = keys.public_pem(another_key()).decode()
    rewrite(full, "keys/style/000002.json", lambda event: event.update(keys=[evil]))

    with pytest.raises(TrustError, match="not one over it"):
        full.keys("style")


def test_keys_of_another_namespace_are_told(full):
    event = full.store.read("keys/style/000001.json")
    full.store.write("keys/prose/000001.json", [event], if_absent=True)

    with pytest.raises(IntegrityError, match="the keys are those of 'style'"):
        full.keys("prose")


def test_a_stray_file_beside_the_events_is_no_name(full):
    full.store.write("index/style/zz/notes.txt", [b""], if_absent=True)

    assert list(full.names()) == ["style/other", "style/tiny"]


def test_a_home_that_does_not_exist_is_bad_input():
    with pytest.raises(InputError, match="no such user"):
        open_registry("~no-such-user/registry")


def test_a_number_has_one_name(full):
    event = full.store.read("index/style/tiny/000002.json")

    for name in ("0000009.json", "\u0660\u0660\u0660\u0660\u0660\u0669.json"):
        assert chain.seq_of(name) is None
    assert chain.seq_of("000009.json") == 9
    assert chain.seq_of("1000000.json") == 1_000_000
    full.store.write("index/style/tiny/0000009.json", [event], if_absent=True)
    assert len(full.events("style/tiny")) == 4


@pytest.mark.parametrize(
    ("pem", "problem"),
    [("junk", "cannot be read: no public key"), (PUBLIC.decode() + "\n", "one spelling")],
)
def test_a_key_that_is_none_is_told_with_its_file(full, pem, problem):
    path = "keys/style/000001.json"
    event = documents.decode(full.store.read(path), documents.KeyEvent, where=path)
    changed = documents.encode(msgspec.structs.replace(event, keys=(pem,)))
    full.store.write(path, [changed], if_absent=False)

    with pytest.raises(IntegrityError, match=problem) as caught:
        full.keys("style")

    assert caught.value.where.endswith(path)


def test_an_event_that_nobody_could_read_is_not_written(full):
    many = [PUBLIC, *(keys.public_pem(another_key()) for _ in range(32))]

    with pytest.raises(DocumentError, match="length <= 32"):
        rotate(full, "style", many, KEY)

    assert full.keys("style") == (PUBLIC,)


def test_what_stands_in_the_place_of_the_next_event_is_named(tmp_path):
    registry = init(tmp_path / "registry", "team")
    push(package(tmp_path / "a"), registry, public_key=PUBLIC)
    (tmp_path / "registry/index/style/tiny/000002.json").mkdir()

    with pytest.raises(StoreError, match="in the way") as caught:
        push(package(tmp_path / "b", version="1.1.0"), registry)

    assert caught.value.where.endswith("index/style/tiny/000002.json")
