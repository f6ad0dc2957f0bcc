"""What begins on a model ends: after interrupts, in tasks and generators, and in memory."""

import asyncio
import contextlib
import gc
import pickle
import threading
import weakref

import pytest
import torch

import lora_hub
from lora_hub.errors import InputError, NotFoundError
from lora_hub.formats.detect import open_adapter
from lora_hub.runtime.host import Host
from tests import nets
from tests.builders import logits, tiny_adapter, tiny_model


@torch.no_grad()
def answer(found):
    return found(found.batch(3))


def words(**ranks):
    """Return a net, a host with adapters, and what each of them alone answers."""
    found = nets.net(nets.Words)
    host = lora_hub.attach(found)
    for name, rank in ranks.items():
        host.load(nets.adapter(found, rank, 10 * rank), as_=name)
    wanted = {None: answer(found)}
    for name in ranks:
        host.use(name)
        wanted[name] = answer(found)
    host.use(None)
    return found, host, wanted


def interrupt(*_):
    raise KeyboardInterrupt


def interrupted(found, host, name):
    """Break a forward off in the middle, as Ctrl-C does; nothing is left of its frames."""
    handle = found.mix.register_forward_hook(interrupt)
    with contextlib.suppress(KeyboardInterrupt), host.using(name):
        answer(found)
    handle.remove()


def test_after_ctrl_c_in_a_forward_the_next_one_uses_what_is_used():
    found, host, wanted = words(one=1, two=2)
    host.use("two")

    for _ in range(5):
        interrupted(found, host, "one")

        assert torch.equal(answer(found), wanted["two"])


def test_after_ctrl_c_in_a_forward_adapters_can_be_merged():
    found, host, wanted = words(one=1, two=2)
    host.use("two")
    interrupted(found, host, "one")

    host.merge()
    host.unmerge()

    assert torch.equal(answer(found), wanted["two"])


def test_tasks_of_one_thread_are_each_in_their_own_block():
    found, host, wanted = words(one=1, two=2)
    answers = {"one": [], "two": [], None: []}

    async def ask(name):
        with host.using(name):
            for _ in range(3):
                await asyncio.sleep(0)
                answers[name].append(answer(found))

    async def ask_all():
        await asyncio.gather(*(ask(name) for name in answers))

    asyncio.run(ask_all())

    for name, found_answers in answers.items():
        assert len(found_answers) == 3
        assert all(torch.equal(each, wanted[name]) for each in found_answers)


def test_what_a_task_hands_to_a_thread_is_in_its_block():
    found, host, wanted = words(one=1, two=2)

    async def ask(name):
        with host.using(name):
            return await asyncio.to_thread(answer, found)

    async def ask_both():
        return await asyncio.gather(ask("one"), ask("two"))

    one, two = asyncio.run(ask_both())

    assert torch.equal(one, wanted["one"])
    assert torch.equal(two, wanted["two"])


def stream(found, host, name, count=3):
    with host.using(name):
        for _ in range(count):
            yield answer(found)


def test_generators_that_take_turns_are_each_in_their_own_block():
    found, host, wanted = words(one=1, two=2)
    streams = {name: stream(found, host, name) for name in ("one", "two", None)}

    for _ in range(3):
        for name, each in streams.items():
            assert torch.equal(next(each), wanted[name])


def test_a_generator_goes_on_in_other_threads_and_inside_of_other_blocks():
    found, host, wanted = words(one=1, two=2)
    each = stream(found, host, "one")
    answers = [next(each)]

    thread = threading.Thread(target=lambda: answers.append(next(each)))
    thread.start()
    thread.join()
    with host.using("two"):
        answers.append(next(each))
        assert torch.equal(answer(found), wanted["two"])

    assert len(answers) == 3
    assert all(torch.equal(each, wanted["one"]) for each in answers)


def test_a_call_beside_a_generator_that_stands_still_in_a_block_is_refused():
    found, host, wanted = words(one=1)
    each = stream(found, host, "one")
    next(each)
    host.load(nets.adapter(found, 2, 20), as_="two")

    with pytest.raises(InputError, match="generator stands still"):
        answer(found)
    with host.using("two"):
        assert not torch.equal(answer(found), wanted["one"])
    assert torch.equal(next(each), wanted["one"])
    each.close()

    assert torch.equal(answer(found), wanted[None])
    assert not host.used


def test_a_generator_closed_by_another_thread_ends_its_block():
    found, host, wanted = words(one=1)
    each = stream(found, host, "one")
    next(each)

    thread = threading.Thread(target=each.close)
    thread.start()
    thread.join()

    assert torch.equal(answer(found), wanted[None])
    host.unload("one")
    assert not host.memory.used_bytes


def test_context_managers_made_of_generators_open_blocks_for_who_enters_them():
    found, host, wanted = words(one=1, two=2)

    @contextlib.contextmanager
    def styled():
        with host.using("one"):
            yield

    with styled():
        assert torch.equal(answer(found), wanted["one"])
        with host.using("two"), styled():
            assert torch.equal(answer(found), wanted["one"])
        with contextlib.ExitStack() as stack:
            stack.enter_context(host.using("two"))
            assert torch.equal(answer(found), wanted["two"])
    assert torch.equal(answer(found), wanted[None])


def test_an_abandoned_generator_ends_its_block_wherever_it_is_collected():
    found, host, _ = words(one=1, two=2)
    each = stream(found, host, "one")
    next(each)
    cycle = [each]
    cycle.append(cycle)

    del each, cycle
    gc.collect()

    host.unload("one")
    assert set(host.memory.adapters) == {
        key for key, held in host.memory.adapters.items() if held.name == "two"
    }


def test_nothing_holds_a_model_and_its_host_once_both_are_gone():
    found, host, _ = words(one=1)
    host.use("one")
    answer(found)
    with host.using(None):
        answer(found)
    with host.using("one"):
        found(found.batch(2)).sum().backward()
    gone = weakref.ref(found), weakref.ref(host)

    del found, host
    gc.collect()

    assert [each() for each in gone] == [None, None]


def test_a_detached_host_does_not_hold_the_model():
    found, host, _ = words(one=1)
    host.use("one")
    host.detach()
    model = weakref.ref(found)

    del found
    gc.collect()

    assert model() is None
    assert not host.memory.used_bytes
    assert repr(host) == "Host(detached)"


def test_two_hosts_never_act_at_once_on_one_model():
    found, host, wanted = words(one=1)
    other = lora_hub.attach(found)
    other.load(nets.adapter(found, 1, 10), as_="one")
    host.use("one")

    for way in (
        lambda: other.use("one"),
        lambda: other.merge("one"),
        lambda: lora_hub.attach(found),
        lambda: lora_hub.attach(torch.nn.Sequential(found.head)),
    ):
        with pytest.raises(InputError, match="another host"):
            way()
    assert torch.equal(answer(found), wanted["one"])
    host.detach()
    other.use("one")

    assert torch.equal(answer(found), wanted["one"])


def test_a_model_on_which_adapters_act_is_not_pickled_and_a_bare_one_is():
    found, host, wanted = words(one=1)
    host.use("one")

    with pytest.raises(InputError, match="pickled"):
        pickle.dumps(found)
    host.use(None)

    assert torch.equal(answer(pickle.loads(pickle.dumps(found))), wanted[None])


class Slow(torch.nn.Module):
    """A layer that waits in its forward until it is told to go on."""

    def __init__(self):
        super().__init__()
        self.begun, self.go_on = threading.Event(), threading.Event()

    def forward(self, x):
        self.begun.set()
        assert self.go_on.wait(20)
        return x


@pytest.mark.parametrize("act", ["merge", "unmerge"])
def test_weights_are_not_written_while_a_forward_of_another_thread_runs(act):
    found = torch.nn.Sequential(torch.nn.Linear(4, 4), Slow(), torch.nn.Linear(4, 4, False))
    linear = found[2]
    update = nets.update(linear, 2, 1, parts=("bias",))
    host = lora_hub.attach(found)
    host.load(lora_hub.Adapter({"2": update}), as_="one")
    host.use("one")
    if act == "unmerge":
        host.merge()  # the bias goes on to act on outputs
    before = linear.weight.clone()
    thread = threading.Thread(target=found, args=(torch.ones(1, 4),))
    thread.start()
    assert found[1].begun.wait(20)

    with pytest.raises(InputError, match="the model runs"):
        getattr(host, act)()
    unchanged = torch.equal(linear.weight, before)
    found[1].go_on.set()
    thread.join()

    assert unchanged
    getattr(host, act)()
    assert not torch.equal(linear.weight, before)


@torch.no_grad()
def test_a_forward_that_began_with_the_base_alone_ends_with_it():
    found = torch.nn.Sequential(torch.nn.Linear(4, 4), Slow(), torch.nn.Linear(4, 4))
    host = lora_hub.attach(found)
    updates = {name: nets.update(found[int(name)], 2, 1) for name in ("0", "2")}
    host.load(lora_hub.Adapter(updates), as_="one")
    x = torch.ones(1, 4)
    wanted = found[2](found[0](x))
    answers = []
    thread = threading.Thread(target=lambda: answers.append(found(x)))
    thread.start()
    assert found[1].begun.wait(20)

    host.use("one")
    found[1].go_on.set()
    thread.join()

    assert torch.equal(answers[0], wanted)
    assert not torch.equal(found(x), wanted)


class Reading:
    """An adapter on disk whose reading waits until it is told to go on."""

    def __init__(self, folder):
        self.source = open_adapter(folder)
        self.name, self.version, self.base, self.notes = folder.name, None, None, ()
        self.digest = "sha256:" + folder.name.encode().hex().ljust(64, "0")
        self.asked, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()
        self.is_gone = False

    def again(self):
        self.asked.set()
        assert self.go_on.wait(20)
        if self.is_gone:
            raise NotFoundError("the package is gone", where=self.name)
        return self.source


def paged(tmp_path):
    """Return a host with three adapters and room for two, and what `find` gave."""
    reading = {
        name: Reading(tiny_adapter(tmp_path / name, seed=seed))
        for seed, name in enumerate(("one", "two", "three"))
    }
    model = tiny_model()
    host = Host(model, lambda what: reading[str(what)])
    host.load("one")
    size = host.memory.used_bytes
    host.detach()
    host = Host(model, lambda what: reading[str(what)], budget=2 * size)
    for name in reading:
        host.load(name)
    return model, host, reading


def test_while_one_thread_reads_a_package_others_go_on(tmp_path):
    _, host, reading = paged(tmp_path)
    reading["one"].go_on.clear()

    def ask():
        with host.using("one"):
            pass

    thread = threading.Thread(target=ask)
    thread.start()
    assert reading["one"].asked.wait(20)
    done = threading.Event()

    def others():
        with host.using("three"):
            pass
        done.set()

    other = threading.Thread(target=others)
    other.start()
    went_on = done.wait(10)
    reading["one"].go_on.set()
    thread.join()
    other.join()

    assert went_on


def test_a_package_that_cannot_be_read_again_leaves_in_force_what_was(tmp_path):
    model, host, reading = paged(tmp_path)
    host.use("three")
    before, memory = logits(model), host.memory.used_bytes
    reading["one"].is_gone = True

    with pytest.raises(NotFoundError, match="gone"):
        host.use("one")

    assert torch.equal(logits(model), before)
    assert dict(host.used) == {"three": 1.0}
    assert host.memory.used_bytes <= memory


def test_nothing_is_merged_while_a_load_reads_the_weights():
    found, host, wanted = words(one=1)
    dora = nets.adapter(found, 2, 7, parts=("magnitude",))
    host.load(dora, as_="dora")
    host.use("dora")
    fresh = answer(found)
    host.use("one")
    stop = threading.Event()

    def merge():
        while not stop.is_set():
            with contextlib.suppress(InputError):
                host.merge()
            host.unmerge()

    thread = threading.Thread(target=merge)
    thread.start()
    for _ in range(40):
        with contextlib.suppress(InputError):
            host.swap("dora", nets.adapter(found, 1, 1))
        with contextlib.suppress(InputError):
            host.swap("dora", dora)
    stop.set()
    thread.join()
    host.swap("dora", dora)
    host.use("dora")

    assert torch.equal(answer(found), fresh)
    host.use(None)
    assert torch.equal(answer(found), wanted[None])
