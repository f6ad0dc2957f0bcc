"""Several threads, one model: each sees what it asked for, whatever the others do.

Threads meet at barriers inside of forwards, so that every run has the forwards overlap.
"""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import lora_hub
from lora_hub.errors import InputError
from tests import nets

ROWS = 4
NAMES = ("one", "two", "three")


@pytest.fixture
def attached():
    found = nets.net(nets.Words)
    host = lora_hub.attach(found)
    for seed, name in enumerate(NAMES, 1):
        parts = ("magnitude",) if name == "three" else ()
        host.load(nets.adapter(found, seed, 100 * seed, parts=parts), as_=name)
    return found, host


@torch.no_grad()
def answer(found):
    return found(found.batch(ROWS))


def in_threads(*works, timeout_s=60):
    with ThreadPoolExecutor(len(works)) as pool:
        futures = [pool.submit(work) for work in works]
        return [future.result(timeout_s) for future in futures]


class Meeting:
    """Makes all threads wait for each other inside of the net's forward, in its middle."""

    def __init__(self, found, threads):
        self._barrier = threading.Barrier(threads, timeout=60)
        self._handle = found.mix.register_forward_pre_hook(self._meet)

    def _meet(self, *_):
        self._barrier.wait()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._handle.remove()


ENTRIES = (
    ["one", None, {"two": 0.5, "three": -1.0}, "three"],
    ["three", "three", "two", None],
    [None, {"one": -2.0}, "one", "one"],
)


def test_each_thread_has_rows_of_its_own(attached):
    found, host = attached

    def work(entries):
        with host.rows(entries):
            return [answer(found) for _ in range(5)]

    wanted = [work(entries)[0] for entries in ENTRIES]
    with Meeting(found, 3):
        answers = in_threads(*[lambda each=each: work(each) for each in ENTRIES])

    for each, alone in zip(answers, wanted, strict=True):
        assert all(torch.equal(one, alone) for one in each)


def test_using_acts_in_its_own_thread_alone_and_use_in_all_others(attached):
    found, host = attached
    host.use("two")
    with host.using("one"):
        one = answer(found)
    two = answer(found)
    inside, done = threading.Event(), threading.Event()

    def work():
        with host.using("one"):
            inside.set()
            done.wait(60)
            return answer(found)

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work)
        inside.wait(60)
        meanwhile = answer(found)
        done.set()

    assert torch.equal(future.result(60), one)
    assert torch.equal(meanwhile, two)
    assert torch.equal(answer(found), two)


def test_the_innermost_of_rows_and_using_wins_and_is_left_again(attached):
    found, host = attached
    host.use("one")
    outer = answer(found)

    with host.using("two"):
        second = answer(found)
        with host.rows(["three"] * ROWS):
            inner = answer(found)
            with host.using(None):
                bare = answer(found)
            assert torch.equal(answer(found), inner)
        assert torch.equal(answer(found), second)

    assert torch.equal(answer(found), outer)
    host.use(None)
    assert torch.equal(answer(found), bare)


CHANGES = {
    "swap": lambda host, new: host.swap("one", new),
    "use": lambda host, new: host.use("two"),
    "use nothing": lambda host, new: host.use(None),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_forward_sees_one_adapter_from_its_first_layer_to_its_last(attached, change):
    found, host = attached
    new = nets.adapter(found, 4, 900)
    host.use("one")
    before = answer(found)
    half_way, changed = threading.Event(), threading.Event()

    def wait(*_):
        half_way.set()
        changed.wait(60)

    handle = found.mix.register_forward_pre_hook(wait)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(answer, found)
        half_way.wait(60)
        CHANGES[change](host, new)
        changed.set()
        began_before = future.result(60)
    handle.remove()

    assert torch.equal(began_before, before)
    assert not torch.equal(answer(found), before)


def test_what_another_thread_uses_cannot_be_unloaded(attached):
    _, host = attached
    inside, done = threading.Event(), threading.Event()

    def work():
        with host.rows(["one", None, None, {"two": 0.5}]):
            inside.set()
            done.wait(60)

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work)
        inside.wait(60)
        refused = []
        for name in ("one", "two"):
            with pytest.raises(InputError) as caught:
                host.unload(name)
            refused.append(caught.value)
        host.unload("three")
        done.set()
        future.result(60)

    assert [each.where for each in refused] == ["one", "two"]
    host.unload("one")
    assert set(host.adapters) == {"two"}


def test_swapping_again_and_again_while_others_run_shows_one_or_the_other(attached):
    found, host = attached
    versions = [nets.adapter(found, rank, 700 + rank) for rank in (1, 5)]
    entries = ["one", None, {"one": -0.5}, "two"]
    possible = []
    for version in versions:
        host.swap("one", version)
        with host.rows(entries):
            possible.append(answer(found))
    stop = threading.Event()

    def swap():
        for turn in range(60):
            host.swap("one", versions[turn % 2])
        stop.set()

    def run():
        answers = []
        while not stop.is_set():
            with host.rows(entries):
                answers.append(answer(found))
        return answers

    seen = in_threads(swap, run, run)[1:]

    assert all(
        any(torch.equal(each, one) for one in possible)
        for answers in seen
        for each in answers
    )


def test_a_failed_forward_leaves_its_thread_as_it_was(attached):
    found, host = attached
    host.use("one")
    wanted = answer(found)

    with host.rows(["two"] * ROWS):
        with pytest.raises(InputError):
            found(found.batch(ROWS + 1))
        with pytest.raises(IndexError):
            found(torch.full((ROWS, 2), nets.VOCABULARY))

    assert torch.equal(answer(found), wanted)
