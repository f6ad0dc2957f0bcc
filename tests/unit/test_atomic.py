"""Files and folders are there whole or not at all."""

import os
import threading
import time
from pathlib import Path

import pytest

from lora_hub import atomic
from lora_hub.errors import StoreError


def test_a_new_file_is_written_once(tmp_path):
    path = tmp_path / "deep" / "file"

    assert atomic.write_new(path, [b"one", b"two"])
    assert not atomic.write_new(path, [b"other"])
    assert path.read_bytes() == b"onetwo"
    assert os.listdir(path.parent) == ["file"]


def test_of_many_writers_one_wins(tmp_path):
    won = []
    threads = [
        threading.Thread(
            target=lambda n=n: (
                atomic.write_new(tmp_path / "x", [b"%d" % n]) and won.append(n)
            )
        )
        for n in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(won) == 1
    assert (tmp_path / "x").read_bytes() == b"%d" % won[0]


def test_a_failing_source_leaves_what_was_there(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def chunks():
        yield b"new"
        raise RuntimeError

    with pytest.raises(RuntimeError):
        atomic.replace(path, chunks())

    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_folder_appears_when_its_block_ends(tmp_path):
    out = tmp_path / "out"

    with atomic.new_folder(out) as folder:
        (folder / "a").write_text("x")
        assert not out.exists()

    assert (out / "a").read_text() == "x"
    assert os.listdir(tmp_path) == ["out"]


def test_a_folder_whose_block_fails_does_not_appear(tmp_path):
    def fill():
        with atomic.new_folder(tmp_path / "out") as folder:
            (folder / "a").write_text("x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fill()

    assert os.listdir(tmp_path) == []


def test_a_full_folder_is_never_taken(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")

    with pytest.raises(StoreError, match="not empty"), atomic.new_folder(tmp_path / "out"):
        pass

    assert (tmp_path / "out" / "mine").read_text() == "x"


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("x")

    with pytest.raises(StoreError) as caught:
        atomic.write_new(tmp_path / "file" / "below", [b""])

    assert "file" in caught.value.where


def test_sweep_removes_what_dead_processes_left(tmp_path):
    old, young = tmp_path / ".tmp-old", tmp_path / "a" / ".tmp-young"
    young.parent.mkdir()
    old.mkdir()
    young.write_text("x")
    os.utime(old, (time.time() - 2 * atomic.STALE_S,) * 2)

    assert atomic.sweep(tmp_path) == 1
    assert young.exists()
    assert not old.exists()


def test_the_next_attempt_at_a_folder_removes_what_was_left_long_ago(tmp_path):
    left = tmp_path / ".tmp-out-abc"
    left.mkdir()
    os.utime(left, (time.time() - 2 * atomic.STALE_S,) * 2)

    with atomic.new_folder(tmp_path / "out"):
        pass

    assert os.listdir(tmp_path) == ["out"]


def test_an_error_names_the_folder_as_the_user_does(tmp_path):
    def fill():
        with atomic.new_folder(tmp_path / "out") as folder:
            (folder / "file").write_text("x")
            atomic.write_new(folder / "file" / "below", [b""])

    with pytest.raises(StoreError) as caught:
        fill()

    assert caught.value.where.startswith(str(tmp_path / "out" / "file"))


def test_a_folder_may_have_any_name(tmp_path):
    with atomic.new_folder(tmp_path / "a**b[") as folder:
        (folder / "file").write_bytes(b"")

    assert (tmp_path / "a**b[" / "file").exists()


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs Linux's /proc")
def test_an_error_names_the_file_as_the_user_does():
    with pytest.raises(StoreError) as caught:
        atomic.write_new(Path("/proc/new"), [b""])

    assert caught.value.where == "/proc/new"
