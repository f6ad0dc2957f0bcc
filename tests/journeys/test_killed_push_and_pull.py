"""`kill -9` before every single step that changes the disk: the next run finishes the work.

A child process counts its calls that change files and kills itself before the k-th, for
k = 1, 2, … until it gets through. After each death the registry, the cache and the pins
are sound, and doing the same again gives what an undisturbed run gives.
"""

import io
import os
import shutil
import signal
import sys
import types

import pytest

from lora_hub import atomic, refs
from lora_hub.package.package import open_package
from lora_hub.registry.cache import Cache
from lora_hub.registry.check import check
from lora_hub.registry.publish import push, yank
from lora_hub.registry.pull import pull
from lora_hub.registry.registry import init, open_registry
from lora_hub.registry.trust import TrustStore
from tests.packages import KEY, PUBLIC, package

pytestmark = [
    # The children call nothing that other tests' threads could hold.
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning"),
]

# What changes the disk: functions of `os` and methods of open files.
STEPS = frozenset(
    {
        *("open", "write", "fsync", "chmod", "fchmod", "utime"),
        *("link", "unlink", "rename", "replace", "mkdir", "rmdir"),
    }
)
MOST = 1000


def is_step(function):
    # Not str.replace or BytesIO.write, which have the name of a step and another owner.
    owner = function.__self__
    kinds = (types.ModuleType, io.BufferedWriter)
    return function.__name__ in STEPS and isinstance(owner, kinds)


def run_until(k, act):
    """Return whether a child that dies before its k-th step gets through `act`."""
    child = os.fork()
    if child == 0:
        steps = 0

        def count(_frame, event, function):
            nonlocal steps
            if event == "c_call" and is_step(function):
                steps += 1
                if steps == k:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.setprofile(count)
        try:
            act()
        except BaseException:  # noqa: BLE001 - the parent must hear of it
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return not os.WIFSIGNALED(status)


def kill_everywhere(tmp_path, prepare, act, examine):
    """Prepare a folder, kill `act` in it, examine; again for every step of `act`.

    Returns:
        How many deaths there were.
    """
    for k in range(1, MOST):
        folder = tmp_path / "place"
        folder.mkdir()
        prepare(folder)
        finished = run_until(k, lambda: act(folder))  # noqa: B023 - run at once
        examine(folder)
        if finished:
            return k - 1
        shutil.rmtree(folder)
    pytest.fail("it never gets through")


def contents(folder):
    """Everything in the folder but what dead processes left behind."""
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and atomic.TEMPORARY not in str(path)
    }


@pytest.fixture
def made(tmp_path, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1795392000")
    return package(tmp_path / "package")


def test_push_killed_anywhere_is_finished_by_the_next(tmp_path, made):
    undisturbed = init(tmp_path / "undisturbed", "test")
    push(made, undisturbed, public_key=PUBLIC)
    whole = contents(tmp_path / "undisturbed")

    def act(folder):
        push(open_package(tmp_path / "package"), open_registry(folder), public_key=PUBLIC)

    def examine(folder):
        registry = open_registry(folder)
        assert check(registry) == ()
        found = contents(folder)
        assert found.items() <= whole.items()
        assert len(registry.events("style/tiny")) == (found == whole)
        act(folder)
        assert contents(folder) == whole
        assert check(registry) == ()
        atomic.sweep(folder, older_than_s=-1)
        assert not list(folder.rglob(f"{atomic.TEMPORARY}*"))

    deaths = kill_everywhere(tmp_path, lambda folder: init(folder, "test"), act, examine)

    assert deaths > 50


def test_yank_killed_anywhere_is_finished_by_the_next(tmp_path, made):
    def prepare(folder):
        push(made, init(folder, "test"), public_key=PUBLIC)

    def act(folder):
        yank(open_registry(folder), "style/tiny", "1.0.0", "broken", KEY)

    def examine(folder):
        registry = open_registry(folder)
        assert check(registry) == ()
        act(folder)
        assert registry.versions("style/tiny")[0].yanked == "broken"
        assert len(registry.events("style/tiny")) == 2

    prepare(tmp_path / "undisturbed")
    act(tmp_path / "undisturbed")  # whatever is imported late is imported now

    deaths = kill_everywhere(tmp_path, prepare, act, examine)

    assert deaths > 5


def test_pull_killed_anywhere_is_finished_by_the_next(tmp_path, made):
    registry = init(tmp_path / "registry", "test")
    push(made, registry, public_key=PUBLIC)
    published = contents(tmp_path / "registry")
    files = {name: made.read(name) for name in made.names}

    def stores(folder):
        return Cache(folder / "cache"), TrustStore(folder / "trust", strict=False)

    def act(folder):
        return pull(refs.parse("style/tiny"), registry, *stores(folder))

    def examine(folder):
        cache, trust = stores(folder)
        assert cache.verify() == ()
        assert [kept.package for kept in cache.list()] in ([], [made.digest])
        pin = trust.get("style")
        assert pin is None or pin.public_keys == (PUBLIC,)
        pulled = act(folder)
        assert {path.name: path.read_bytes() for path in pulled.folder.iterdir()} == files
        assert cache.verify() == ()
        assert trust.get("style").public_keys == (PUBLIC,)
        assert contents(tmp_path / "registry") == published
        atomic.sweep(folder, older_than_s=-1)
        assert not list(folder.rglob(f"{atomic.TEMPORARY}*"))

    act(tmp_path / "undisturbed")

    deaths = kill_everywhere(tmp_path, lambda _folder: None, act, examine)

    assert deaths > 20
