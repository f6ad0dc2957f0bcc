"""Packages in the cache are whole, read-only, and told when damaged."""

import os
import shutil
import stat
import time
from pathlib import Path

import pytest

from lora_hub import digest
from lora_hub.errors import StoreError, TrustError
from lora_hub.package.package import open_package
from lora_hub.registry.cache import Cache
from tests.packages import package


@pytest.fixture
def made(tmp_path):
    return package(tmp_path / "package")


def put(cache, made):
    return cache.put(made.digest, [(name, made.read(name)) for name in made.names])


def damage(folder, name="README.md"):
    (folder / name).chmod(0o644)
    (folder / name).write_text("damaged")


def test_gives_back_what_was_put(cache, made):
    assert cache.get(made.digest) is None

    folder = put(cache, made)

    assert cache.get(made.digest) == folder
    assert open_package(folder).digest == made.digest
    assert [found.package for found in cache.list()] == [made.digest]
    assert cache.verify() == ()


def test_files_are_read_only_and_nobody_else_may_enter(cache, made):
    folder = put(cache, made)

    for file in folder.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o444
    assert stat.S_IMODE(cache.folder.stat().st_mode) == 0o700


def test_putting_twice_is_once(cache, made):
    assert put(cache, made) == put(cache, made)
    assert len(list(cache.folder.iterdir())) == 1


def test_refuses_a_cache_that_others_may_write_to(cache, made):
    put(cache, made)
    cache.folder.chmod(0o777)

    with pytest.raises(TrustError, match="others may write") as caught:
        cache.get(made.digest)
    assert caught.value.hint == f"chmod go-w {cache.folder}"
    with pytest.raises(TrustError, match="others may write"):
        cache.put(digest.of_bytes(b"other"), [])


def test_a_failed_put_leaves_nothing(cache, made):
    def files():
        yield "lorahub.json", made.manifest_bytes
        raise StoreError("the registry went away")

    with pytest.raises(StoreError, match="went away"):
        cache.put(made.digest, files())

    assert cache.get(made.digest) is None
    assert list(cache.folder.iterdir()) == []


def test_says_where_it_cannot_be_written(tmp_path, made):
    (tmp_path / "file").write_text("")

    with pytest.raises(StoreError, match="cannot be written") as caught:
        put(Cache(tmp_path / "file"), made)

    assert "LORAHUB_CACHE" in caught.value.hint


def test_verify_tells_a_changed_file_and_a_foreign_folder(cache, made, tmp_path):
    folder = put(cache, made)
    other = package(tmp_path / "other", version="1.1.0")
    foreign = put(cache, other).rename(cache.folder / digest.of_bytes(b"x")[7:])

    damage(folder)

    problems = cache.verify()
    assert len(problems) == 2
    assert {problem.where for problem in problems} == {
        str(folder / "README.md"),
        str(foreign),
    }


def test_prune_removes_what_is_damaged_or_long_unused(cache, made, tmp_path):
    fresh = put(cache, made)
    unused = put(cache, package(tmp_path / "b", version="1.1.0"))
    damaged = put(cache, package(tmp_path / "c", version="1.2.0"))
    damage(damaged)
    left = cache.folder / ".tmp-left"
    left.mkdir()
    long_ago = time.time() - 100 * 24 * 3600
    os.utime(unused, (long_ago, long_ago))
    os.utime(left, (long_ago, long_ago))

    pruned = cache.prune()

    assert pruned.packages == 2
    assert pruned.size_bytes > 0
    assert list(cache.folder.iterdir()) == [fresh]


def test_use_keeps_a_package_from_being_pruned(cache, made):
    folder = put(cache, made)
    long_ago = time.time() - 100 * 24 * 3600
    os.utime(folder, (long_ago, long_ago))

    cache.get(made.digest)

    assert cache.prune().packages == 0


def test_an_empty_cache_has_nothing(cache):
    assert cache.list() == ()
    assert cache.verify() == ()
    assert cache.prune().packages == 0


def test_a_cache_that_cannot_be_looked_at_is_told(made):
    cache = Cache(Path("/", "a" * 5000))

    with pytest.raises(StoreError, match="cannot be read"):
        cache.get(made.digest)


def test_a_package_that_another_process_prunes_is_passed_over(cache, made, monkeypatch):
    folder = put(cache, made)
    listed = cache.list()
    shutil.rmtree(folder)
    monkeypatch.setattr(cache, "list", lambda: listed)

    assert cache.prune().packages == 0
