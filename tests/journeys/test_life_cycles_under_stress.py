"""Threads that do everything at once within a tiny budget, and interrupts at every line."""

import gc
import linecache
import random
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import lora_hub
from lora_hub import runtime
from lora_hub.errors import LoraHubError
from tests import nets

pytestmark = pytest.mark.slow

HOME = str(Path(runtime.__file__).parent)
SECONDS = 8
# Lines at which Python sees no signal, but a tracer would.
PASSED = ("with ", "try", "finally", "except", "raise", "@")
PARTS = ((), ("magnitude",), ("q",), ("bias",))


@torch.no_grad()
def answer(found, rows=3):
    return found(found.batch(rows))


def alone(made):
    """Return what a net answers that uses this adapter, with a host of its own."""
    found = nets.net(nets.Words)
    host = lora_hub.attach(found)
    host.load(made, as_="one")
    host.use("one")
    return answer(found, 1)


def is_near(found, wanted):
    # Rows of a batch round in another order than a row alone; adapters differ by percents.
    return torch.allclose(found, wanted, rtol=1e-5, atol=2e-5)


class Doing:
    """What several threads do with one host, each answer compared."""

    def __init__(self, budget, kinds):
        self.found = nets.net(nets.Words)
        self.host = lora_hub.attach(self.found, budget=budget)
        self.budget, self.kinds = budget, kinds
        # Name → two adapters that take turns under it, with what each answers.
        self.pool = {
            str(index): [
                (made, alone(made))
                for made in (
                    nets.adapter(self.found, 1 + seed % 5, seed, parts=PARTS[index % 4])
                    for seed in (10 * index, 10 * index + 1)
                )
            ]
            for index in range(8)
        }
        self.bare = answer(self.found, 1)
        self.wrong, self.done = [], 0
        for name, ((made, _), _) in self.pool.items():
            self.host.load(made, as_=name)

    def is_one_of(self, found, names):
        return any(is_near(found, each) for name in names for _, each in self.pool[name])

    def using(self, name, _):
        with self.host.using(name):
            return [(answer(self.found, 1), name)] * 2

    def rows(self, name, chance):
        other = chance.choice(sorted(self.pool))
        x = self.found.batch(1)
        with self.host.rows([name, None, other]):
            found = self.found(x.expand(3, -1))
        return [(found[:1], name), (found[1:2], None), (found[2:], other)]

    def swap(self, name, chance):
        self.host.swap(name, chance.choice(self.pool[name])[0])

    def again(self, name, chance):
        if name in self.host.adapters:
            self.host.unload(name)
        self.host.load(chance.choice(self.pool[name])[0], as_=name)

    def use(self, name, chance):
        self.host.use(chance.choice([None, name]))

    def forward(self, *_):
        found = answer(self.found, 1)
        if not is_near(found, self.bare) and not self.is_one_of(found, self.pool):
            self.wrong.append("forward")

    def merge(self, name, _):
        self.host.merge(name)
        while True:
            try:
                return self.host.unmerge()
            except LoraHubError:
                continue

    def run(self, seed, until):
        chance = random.Random(seed)
        while time.monotonic() < until:
            kind, name = chance.choice(self.kinds), chance.choice(sorted(self.pool))
            try:
                with torch.no_grad():
                    for found, used in getattr(self, kind)(name, chance) or ():
                        right = (
                            is_near(found, self.bare)
                            if used is None
                            else self.is_one_of(found, [used])
                        )
                        if not right:
                            self.wrong.append((kind, used))
                self.done += 1
            except LoraHubError:
                continue  # refused by name: in use, no room, unloaded meanwhile
            except BaseException as error:  # noqa: BLE001  (a thread's end is not seen)
                self.wrong.append(error)
            if self.host.memory.used_bytes > self.budget:
                self.wrong.append("budget")


@pytest.mark.parametrize("last", ["forward", "merge"])
def test_whatever_threads_do_every_answer_is_right_and_the_budget_is_kept(last):
    kinds = ["using", "using", "rows", "swap", "again", "use", last]
    doing = Doing(9000 if last == "forward" else 14_000, kinds)
    until = time.monotonic() + SECONDS

    threads = [threading.Thread(target=doing.run, args=(n, until)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS + 60)
    doing.host.use(None)

    assert not any(thread.is_alive() for thread in threads)
    assert not doing.wrong
    assert doing.done > 100
    assert torch.equal(answer(doing.found, 1), doing.bare)


class Interrupt:
    """Raises KeyboardInterrupt at the n-th line of the runtime that runs.

    Not where Python sees no signal and a tracer would, as between a lock and its block.
    """

    def __init__(self, at):
        self.left, self.where = at, None

    def __call__(self, frame, _event, _arg):
        return self.line if frame.f_code.co_filename.startswith(HOME) else None

    def line(self, frame, event, _arg):
        if event != "line" or self.where is not None:
            return self.line
        code = frame.f_code
        text = linecache.getline(code.co_filename, frame.f_lineno).strip()
        # What is freed cannot be interrupted: Python drops what a finalizer raises.
        if code.co_name in ("__del__", "release", "_release"):
            return self.line
        if not text.startswith(PASSED):
            self.left -= 1
            if self.left <= 0:
                self.where = code.co_filename, frame.f_lineno
                raise KeyboardInterrupt
        return self.line


def block(host, found, _):
    with host.rows(["b", None, "a"]):
        answer(found)


# What is done, and how many lines lie between two interrupts that are tried.
INTERRUPTED = {
    "use": (lambda host, found, new: host.use("b"), 4),
    "block": (block, 7),
    "load": (lambda host, found, new: host.load(new, as_="d"), 61),
    "swap": (lambda host, found, new: host.swap("a", new), 61),
    "unload": (lambda host, found, new: host.unload("c"), 1),
    "merge": (lambda host, found, new: host.merge(), 41),
    "unmerge": (lambda host, found, new: host.unmerge(), 13),
}


@pytest.mark.parametrize("what", INTERRUPTED)
def test_wherever_an_interrupt_comes_the_host_goes_on_and_tells_the_truth(what):
    act, every = INTERRUPTED[what]
    shelf = nets.net(nets.Words)
    made = {
        name: nets.adapter(shelf, rank, rank, parts=parts)
        for name, rank, parts in (("a", 1, ()), ("b", 2, ("magnitude",)), ("c", 3, ("q",)))
    }
    new = nets.adapter(shelf, 4, 99)
    wanted = {name: alone(each) for name, each in (*made.items(), ("d", new))}
    bare = answer(shelf, 1)
    at, where = 1, "the beginning"

    while where is not None:
        found = nets.net(nets.Words)
        host = lora_hub.attach(found)
        for name, each in made.items():
            host.load(each, as_=name)
        host.use("a")
        if what == "unmerge":
            host.merge()
        interrupt = Interrupt(at)
        sys.settrace(interrupt)
        try:
            act(host, found, new)
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        where = interrupt.where

        (used,) = host.used
        right = [wanted[used], *([wanted["d"]] if used == "a" else [])]
        assert any(is_near(answer(found, 1), each) for each in right), where
        host.unmerge()
        host.use(None)
        assert torch.equal(answer(found, 1), bare), where
        for name in tuple(host.adapters):
            host.use(name)
            assert any(is_near(answer(found, 1), each) for each in wanted.values()), where
            host.use(None)
            host.unload(name)
        host.memory.used_bytes and gc.collect()
        assert host.memory.used_bytes == 0, where
        assert not host.memory.adapters, where
        host.detach()
        at += every
