"""Every store does the same; the local one also withstands what a folder may hold."""

import os
import threading

import pytest

from lora_hub.errors import IntegrityError, NotFoundError, StoreError
from lora_hub.registry.stores.local import LocalStore
from lora_hub.registry.stores.memory import MemoryStore
from lora_hub.registry.stores.protocol import Stat


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path):
    return MemoryStore() if request.param == "memory" else LocalStore(tmp_path)


def test_reads_what_was_written(store):
    assert store.write("a/b.json", [b"one ", memoryview(b"two")], if_absent=True)

    assert store.read("a/b.json") == b"one two"
    assert store.stat("a/b.json") == Stat(size_bytes=7)


def test_keeps_the_first_file_when_asked_to(store):
    store.write("a", [b"first"], if_absent=True)

    assert not store.write("a", [b"second"], if_absent=True)
    assert store.read("a") == b"first"


def test_replaces_a_file_when_asked_to(store):
    store.write("a", [b"first"], if_absent=True)

    assert store.write("a", [b"second"], if_absent=False)
    assert store.read("a") == b"second"


def test_says_that_nothing_is_there(store):
    assert store.stat("a/b") is None
    assert list(store.list("a")) == []
    store.delete("a/b")
    with pytest.raises(NotFoundError, match="no such file"):
        store.read("a/b")


def test_lists_what_is_below_a_folder_in_order(store):
    for path in ("index/b/2", "index/a/1", "index2/a", "config.json"):
        store.write(path, [b""], if_absent=True)

    assert list(store.list("index")) == ["index/a/1", "index/b/2"]
    assert list(store.list("")) == ["config.json", "index/a/1", "index/b/2", "index2/a"]


def test_deletes(store):
    store.write("a/b", [b""], if_absent=True)

    store.delete("a/b")

    assert store.stat("a/b") is None


def test_reads_no_more_than_the_limit(store):
    store.write("a", [b"12345"], if_absent=True)

    assert store.read("a", max_bytes=5) == b"12345"
    with pytest.raises(IntegrityError, match="at most 4"):
        store.read("a", max_bytes=4)


def test_of_many_writers_one_creates(store):
    start = threading.Barrier(16)
    won = []

    def write(number):
        start.wait()
        if store.write("event", [b"%d" % number], if_absent=True):
            won.append(number)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(won) == 1
    assert store.read("event") == b"%d" % won[0]


PATHS = [
    "",
    "/etc/passwd",
    "..",
    "a/../b",
    "a//b",
    "a/.hidden",
    "a\\b",
    "C:x",
    "a b",
    "a/%2e",
]


@pytest.mark.parametrize("path", PATHS)
def test_refuses_path(store, path):
    for act in (store.read, store.stat, store.delete):
        with pytest.raises(StoreError, match="no path of a store"):
            act(path)
    with pytest.raises(StoreError, match="no path of a store"):
        store.write(path, [b""], if_absent=True)


def test_local_follows_no_links(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret").write_text("secret")
    store = LocalStore(tmp_path / "store")
    store.folder.mkdir()
    (store.folder / "folder").symlink_to(tmp_path / "outside")
    (store.folder / "file").symlink_to(tmp_path / "outside/secret")

    for path in ("file", "folder/secret"):
        with pytest.raises(StoreError, match="symbolic link"):
            store.read(path)
    with pytest.raises(StoreError, match="symbolic link"):
        store.write("folder/new", [b""], if_absent=True)
    assert list(store.list("")) == ["file", "folder"]
    assert os.listdir(tmp_path / "outside") == ["secret"]


def test_local_does_not_wait_for_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")

    with pytest.raises(StoreError, match="no regular file"):
        LocalStore(tmp_path).read("pipe")


def test_local_reports_what_the_system_refuses(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    store = LocalStore(tmp_path)

    with pytest.raises(StoreError):
        store.read("folder")
    with pytest.raises(StoreError, match="cannot be removed"):
        store.delete("folder")
    with pytest.raises(StoreError, match="cannot be written"):
        store.write("file/below", [b""], if_absent=True)
    with pytest.raises(NotFoundError):
        store.read("file/below")


def test_local_does_not_list_what_a_killed_writer_left(tmp_path):
    (tmp_path / ".tmp-abc").write_text("half")

    assert list(LocalStore(tmp_path).list("")) == []


def test_gives_a_file_in_pieces(store):
    store.write("a", [b"12", b"345"], if_absent=True)

    assert b"".join(store.chunks("a")) == b"12345"
    with pytest.raises(NotFoundError):
        list(store.chunks("b"))
