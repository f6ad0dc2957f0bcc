"""A whole registry: sound, or every way in which it is not."""

import os

import pytest

from lora_hub import canonical, strict_json
from lora_hub.registry.check import check
from lora_hub.registry.publish import push, rotate, unyank, yank
from lora_hub.registry.registry import Registry, blob_path, init
from lora_hub.registry.stores.memory import MemoryStore
from lora_hub.signing import keys
from tests.packages import KEY, PUBLIC, another_key, package

EVENT = "index/style/tiny/000001.json"


@pytest.fixture
def registry(tmp_path):
    registry = Registry(MemoryStore())
    made = init(tmp_path / "registry", "test")
    registry.store.write("config.json", [made.store.read("config.json")], if_absent=True)
    return registry


def forge(registry, path, **fields):
    value = strict_json.decode(registry.store.read(path), where=path) | fields
    registry.store.write(path, [canonical.encode(value)], if_absent=False)


def test_an_empty_registry_is_sound(registry):
    assert check(registry) == ()


def test_a_registry_with_a_history_is_sound(registry, made, tmp_path):
    push(package(tmp_path / "b", version="1.1.0"), registry)
    yank(registry, "style/tiny", "1.1.0", "broken", KEY)
    unyank(registry, "style/tiny", "1.1.0", KEY)
    rotate(registry, "style", [PUBLIC, keys.public_pem(another_key())], KEY)

    assert check(registry) == ()


def test_a_blob_nobody_names_is_fine(registry, made):
    registry.put_blob(b"left by a publisher who was stopped")

    assert check(registry) == ()


def test_pages_and_gits_own_files_are_fine(registry, made):
    for path in ("README.md", "LICENSE"):
        registry.store.write(path, [b""], if_absent=True)

    assert check(registry) == ()


def test_git_files_in_a_folder_are_fine(tmp_path):
    registry = init(tmp_path, "test")
    (tmp_path / ".gitattributes").write_text("* -text")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git/HEAD").write_text("ref")

    assert check(registry) == ()


def damaged_blob(registry, made):
    registry.store.write(
        blob_path(made.entry("README.md").sha256), [b"# style/time\n"], if_absent=False
    )


def missing_blob(registry, made):
    registry.store.delete(blob_path(made.entry("README.md").sha256))


def missing_manifest(registry, made):
    registry.store.delete(blob_path(made.digest))


def missing_keys(registry, made):
    registry.store.delete("keys/style/000001.json")


def lying_facet(registry, made):
    forge(registry, EVENT, max_rank=1)


def lying_size(registry, made):
    forge(registry, EVENT, size_bytes=1)


def other_key(registry, made):
    pem = keys.public_pem(another_key()).decode()
    forge(registry, "keys/style/000001.json", keys=[pem])


def missing_event(registry, made):
    yank(registry, "style/tiny", "1.0.0", "broken", KEY)
    registry.store.delete(EVENT)


def unreadable_event(registry, made):
    registry.store.write(EVENT, [b"{}"], if_absent=False)


def unknown_file(registry, made):
    registry.store.write("index/notes.txt", [b""], if_absent=True)


def misspelt_name(registry, made):
    registry.store.write("index/Style/tiny/000001.json", [b""], if_absent=True)


def misplaced_blob(registry, made):
    name = made.digest.removeprefix("sha256:")
    registry.store.write(f"blobs/sha256/zz/{name}", [b""], if_absent=True)


def lost_config(registry, made):
    registry.store.delete("config.json")


BROKEN = {
    damaged_blob: "expected sha256:",
    missing_blob: "README.md of style/tiny 1.0.0 is missing",
    missing_manifest: "no such file",
    missing_keys: "nobody claimed the namespace",
    lying_facet: "other things than the manifest: max_rank 1 and 2",
    lying_size: "other things than the manifest: size_bytes 1 and",
    other_key: "signed with another key",
    missing_event: "the event is missing",
    unreadable_event: "the event cannot be read",
    unknown_file: "the file is none of a registry",
    misspelt_name: "the file is none of a registry",
    misplaced_blob: "the file is none of a registry",
    lost_config: "no such file",
}


@pytest.mark.parametrize("damage", BROKEN, ids=lambda damage: damage.__name__)
def test_tells(registry, made, damage):
    damage(registry, made)

    problems = check(registry)

    assert [BROKEN[damage] in problem.message for problem in problems] == [True]


def test_goes_on_after_the_first_problem(registry, made, tmp_path):
    other = package(tmp_path / "other", name="style/other")
    push(other, registry)
    forge(registry, EVENT, max_rank=1)
    registry.store.delete(blob_path(other.entry("README.md").sha256))

    assert len(check(registry)) == 2


def test_an_event_under_a_second_name_is_told(registry, made):
    registry.store.write(
        "index/style/tiny/0000002.json", [registry.store.read(EVENT)], if_absent=True
    )

    (problem,) = check(registry)

    assert "0000002.json" in problem.where
    assert "none of a registry" in problem.message


def test_a_blob_beyond_all_packages_is_not_read(tmp_path):
    registry = init(tmp_path / "registry", "team")
    push(package(tmp_path / "package"), registry, public_key=PUBLIC)
    blob = next(path for path in tmp_path.glob("registry/blobs/*/*/*"))
    os.truncate(blob, 1 << 42)  # sparse: it takes no space

    problems = check(registry)

    assert any("those of packages have at most" in found.message for found in problems)


def test_what_is_wrong_with_a_key_is_said_once(registry, made, tmp_path):
    push(package(tmp_path / "b", version="1.1.0"), registry)
    forge(registry, "keys/style/000001.json", keys=["junk"])

    (problem,) = check(registry)

    assert "a key cannot be read" in problem.message
