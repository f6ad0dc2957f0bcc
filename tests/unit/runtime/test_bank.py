"""Which adapters are resident: budgets, leases, what leaves, what comes back, threads."""

import gc
import random
import threading

import pytest
import torch
from torch import nn

from lora_hub.adapter.adapter import Adapter
from lora_hub.adapter.update import Update
from lora_hub.errors import ComposeError, InputError, NotFoundError, StoreError
from lora_hub.runtime.bank import Bank
from lora_hub.runtime.prepare import prepare
from lora_hub.runtime.sites import Sites

WIDTH = 64
ONE = 2 * WIDTH * 4  # bytes of rank 1


def model():
    torch.manual_seed(0)
    return nn.ModuleDict({"layer": nn.Linear(WIDTH, WIDTH)}).requires_grad_(
        requires_grad=False
    )


def adapter(seed=0, *, rank=1, magnitude=None, scaling=1.0):
    generator = torch.Generator().manual_seed(seed)
    return Adapter(
        {
            "layer": Update(
                a=torch.randn(rank, WIDTH, generator=generator),
                b=torch.randn(WIDTH, rank, generator=generator),
                scaling=torch.full((rank,), scaling, dtype=torch.float64),
                magnitude=magnitude,
            )
        }
    )


class Shelf:
    """A bank with adapters that are read again when they come back, each time counted."""

    def __init__(self, budget, ranks=(), **given):
        self.model = model()
        self.bank = Bank(Sites(), budget=budget, **given)
        self.adapters = {}
        self.read = []
        for index, rank in enumerate(ranks):
            self.put(f"k{index}", adapter(index, rank=rank))

    def put(self, key, given, **more):
        self.adapters[key] = given
        prepared = prepare(self.model, given, where=key)
        self.bank.put(key, prepared, name=f"name-{key}", reload=self._reload(key), **more)

    def _reload(self, key):
        def again(norms):
            self.read.append(key)
            return prepare(self.model, self.adapters[key], where=key, norms=norms)

        return again

    def resident(self):
        held = self.bank.memory.adapters
        return {key for key, each in held.items() if each.tier == "device"}

    def is_right(self, key, resident):
        given = self.adapters[key].updates["layer"]
        found = resident.at[0]
        return torch.equal(found.a, given.a) and torch.equal(found.bt, given.b.T)


def test_everything_is_resident_without_a_budget():
    shelf = Shelf(None, ranks=[1, 2, 3])

    with shelf.bank.lease(["k0", "k1", "k2"]) as lease:
        assert all(shelf.is_right(*each) for each in lease.residents.items())

    assert shelf.bank.used_bytes == 6 * ONE
    assert not shelf.read


def test_what_was_asked_for_longest_ago_leaves_and_comes_back_the_same():
    shelf = Shelf(3 * ONE, ranks=[1, 1, 1])
    shelf.bank.lease(["k0"]).release()

    shelf.put("k3", adapter(3))

    assert shelf.resident() == {"k0", "k2", "k3"}
    with shelf.bank.lease(["k1"]) as lease:
        assert shelf.is_right("k1", lease.residents["k1"])
        assert shelf.resident() == {"k0", "k1", "k3"}
    assert shelf.read == ["k1"]


def test_what_is_leased_stays():
    shelf = Shelf(2 * ONE, ranks=[1, 1])
    lease = shelf.bank.lease(["k0"])

    shelf.put("k2", adapter(2))
    shelf.put("k3", adapter(3))

    assert shelf.resident() == {"k0", "k3"}
    lease.release()
    shelf.bank.lease(["k1"]).release()
    assert shelf.resident() == {"k1", "k3"}


def test_a_lease_counts_as_often_as_it_is_taken():
    shelf = Shelf(1 * ONE, ranks=[1, 1])
    first, second = shelf.bank.lease(["k0"]), shelf.bank.lease(["k0"])

    first.release()
    first.release()

    assert shelf.bank.is_leased("k0")
    with pytest.raises(InputError):
        shelf.bank.lease(["k1"])
    second.release()
    assert not shelf.bank.is_leased("k0")


def test_adapters_that_do_not_fit_together_are_refused_and_nothing_leaves():
    shelf = Shelf(5 * ONE, ranks=[2, 2, 3])
    before = shelf.resident()

    with pytest.raises(InputError) as caught:
        shelf.bank.lease(["k0", "k1", "k2"])

    assert caught.value.problem == (
        "1.0 kB are needed, and of the budget of 2.6 kB 2.6 kB are in use"
    )
    assert caught.value.where == "name-k0"
    assert shelf.resident() == before == {"k1", "k2"}
    assert not shelf.bank.is_leased("k1")


def test_an_adapter_larger_than_the_budget_is_refused_by_name():
    shelf = Shelf(3 * ONE, ranks=[1])

    with pytest.raises(InputError, match=r"takes 2\.0 kB, the budget is 1\.5 kB") as caught:
        shelf.put("large", adapter(rank=4))

    assert caught.value.where == "name-large"
    assert "large" not in shelf.bank
    assert shelf.resident() == {"k0"}


def test_an_adapter_for_which_there_is_no_room_now_comes_when_it_is_leased():
    shelf = Shelf(2 * ONE, ranks=[2])
    with shelf.bank.lease(["k0"]):
        shelf.put("k1", adapter(1))
        assert shelf.bank.memory.adapters["k1"].tier == "disk"

    with shelf.bank.lease(["k1"]) as lease:
        assert shelf.is_right("k1", lease.residents["k1"])


def test_an_adapter_in_memory_needs_no_reload_and_is_told_apart():
    shelf = Shelf(ONE)
    given = adapter(1)
    shelf.bank.put("mine", prepare(shelf.model, given, where="mine"), name="mine")

    shelf.put("k0", adapter(0))

    assert shelf.bank.memory.adapters["mine"].tier == "memory"
    with shelf.bank.lease(["mine"]) as lease:
        assert torch.equal(lease.residents["mine"].at[0].a, given.updates["layer"].a)


def test_the_same_identity_twice_takes_room_once():
    shelf = Shelf(None, ranks=[1])

    shelf.put("k0", adapter(0))

    assert shelf.bank.used_bytes == ONE


def test_dropped_while_leased_it_stays_until_the_lease_ends_and_counts_until_then():
    shelf = Shelf(2 * ONE, ranks=[1])
    lease = shelf.bank.lease(["k0"])

    shelf.bank.drop("k0")

    assert "k0" not in shelf.bank
    assert shelf.bank.used_bytes == ONE
    assert shelf.is_right("k0", lease.residents["k0"])
    lease.release()
    assert shelf.bank.used_bytes == 0
    with pytest.raises(NotFoundError, match="no adapter of this identity"):
        shelf.bank.lease(["k0"])


def test_the_same_identity_put_again_after_a_drop_is_not_taken_by_the_old_lease():
    shelf = Shelf(2 * ONE, ranks=[1])
    lease = shelf.bank.lease(["k0"])
    shelf.bank.drop("k0")
    shelf.put("k0", adapter(0))

    lease.release()

    assert shelf.resident() == {"k0"}
    assert shelf.bank.used_bytes == ONE
    shelf.bank.drop("k0")
    assert shelf.bank.used_bytes == 0


def test_bytes_count_until_what_still_runs_has_let_them_go():
    shelf = Shelf(2 * ONE, ranks=[1])
    x = torch.ones(1, WIDTH, requires_grad=True)
    with shelf.bank.lease(["k0"]) as lease:
        y = (x @ lease.residents["k0"].at[0].a.T).sum()
    del lease
    shelf.bank.drop("k0")

    assert shelf.bank.used_bytes == ONE
    shelf.put("k1", adapter(1))
    shelf.put("k2", adapter(2, rank=2))
    with pytest.raises(InputError, match="512 B are needed by what still runs") as caught:
        shelf.bank.lease(["k1", "k2"])
    assert caught.value.where == "name-k2"
    y.backward()
    del y
    assert shelf.bank.used_bytes == ONE  # k1
    shelf.bank.lease(["k2"]).release()


def test_what_left_is_freed_at_once_without_the_garbage_collector():
    shelf = Shelf(2 * ONE, ranks=[1, 1])
    gc.disable()
    try:
        for key in ("k0", "k1"):
            shelf.bank.lease([key]).release()
            shelf.bank.drop(key)

        assert shelf.bank.used_bytes == 0
    finally:
        gc.enable()


def test_dora_comes_back_with_its_norms_after_the_weights_were_changed():
    shelf = Shelf(4 * ONE)
    shelf.put("dora", adapter(rank=2, magnitude=torch.ones(WIDTH, dtype=torch.float64)))
    with shelf.bank.lease(["dora"]) as lease:
        before = {
            name: getattr(lease.residents["dora"].at[0], name).clone() for name in "ap"
        }
        bt = lease.residents["dora"].at[0].bt.clone()
    del lease
    shelf.put("k1", adapter(1, rank=2))  # in the place of the other
    shelf.model["layer"].weight.mul_(3)

    with shelf.bank.lease(["dora"]) as lease:
        found = lease.residents["dora"].at[0]

        assert shelf.read == ["dora"]
        assert torch.equal(found.bt, bt)
        assert all(torch.equal(getattr(found, name), before[name]) for name in before)


def test_norms_count_as_long_as_the_adapter_is_loaded():
    shelf = Shelf(4 * ONE)
    magnitude = torch.ones(WIDTH, dtype=torch.float64)
    shelf.put("dora", adapter(rank=1, magnitude=magnitude))

    memory = shelf.bank.memory

    assert memory.norms_bytes == WIDTH * 8
    assert memory.used_bytes == ONE + WIDTH * 4 + memory.norms_bytes  # p is float32
    shelf.bank.drop("dora")
    assert shelf.bank.memory.norms_bytes == shelf.bank.used_bytes == 0


def test_a_file_that_is_gone_changes_nothing_and_may_come_back():
    shelf = Shelf(ONE, ranks=[1, 1])
    kept = shelf.adapters.pop("k0")

    with pytest.raises(KeyError):
        shelf.bank.lease(["k0"])

    assert shelf.bank.used_bytes == 0
    assert not shelf.bank.is_leased("k0")
    shelf.adapters["k0"] = kept
    with shelf.bank.lease(["k0"]) as lease:
        assert shelf.is_right("k0", lease.residents["k0"])


def test_one_failing_adapter_of_a_lease_gives_back_the_room_of_all():
    shelf = Shelf(3 * ONE, ranks=[1, 1, 1, 1, 1, 1])
    kept = shelf.adapters.pop("k0")

    with pytest.raises(KeyError):
        shelf.bank.lease(["k0", "k1", "k2"])

    shelf.adapters["k0"] = kept
    with shelf.bank.lease(["k0", "k1", "k2"]) as lease:
        assert all(shelf.is_right(*each) for each in lease.residents.items())
    assert shelf.bank.used_bytes == 3 * ONE


def test_numbers_that_are_not_finite_leave_nothing_behind():
    shelf = Shelf(4 * ONE)

    with pytest.raises(ComposeError, match="not finite"):
        shelf.put("k0", adapter(scaling=1e300))

    assert "k0" not in shelf.bank
    assert shelf.bank.used_bytes == 0


def test_a_model_in_a_wider_dtype_makes_an_adapter_larger_and_the_count_follows():
    shelf = Shelf(4 * ONE, ranks=[2, 2, 1])
    shelf.model.double()

    with shelf.bank.lease(["k0"]) as lease:
        assert lease.residents["k0"].at[0].a.dtype == torch.float64
        assert shelf.bank.used_bytes == lease.residents["k0"].nbytes == 4 * ONE


def test_what_was_put_is_prepared_once_more():
    shelf = Shelf(ONE, ranks=[1])

    prepared = shelf.bank.again("k0")

    assert prepared.updates["layer"].update is shelf.adapters["k0"].updates["layer"]


def test_figures_are_told_in_a_sentence():
    shelf = Shelf(2 * ONE, ranks=[1, 1, 1])

    assert str(shelf.bank.memory) == "2 of 3 adapters resident in 1.0 kB of 1.0 kB"


def test_two_threads_that_ask_for_one_adapter_read_it_once():
    shelf = Shelf(2 * ONE, ranks=[1, 1, 1])
    reading, go = threading.Event(), threading.Event()
    plain = shelf.adapters["k0"]

    class Slow(dict):
        def __getitem__(self, key):
            reading.set()
            go.wait(20)
            return plain

    shelf.adapters = Slow(shelf.adapters)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(shelf.bank.lease(["k0"])))
        for _ in range(2)
    ]
    threads[0].start()
    reading.wait(20)
    threads[1].start()
    shelf.bank.lease(["k2"]).release()  # meanwhile others are not kept waiting
    go.set()
    for thread in threads:
        thread.join(20)

    assert shelf.read == ["k0"]
    assert found[0].residents["k0"] is found[1].residents["k0"]


def test_threads_that_page_all_the_time_never_pass_the_budget_and_are_right():
    ranks = [1, 2, 3, 1, 2, 3, 1, 2, 3, 1]
    shelf = Shelf(8 * ONE, ranks=ranks)
    wrong, most, refused = [], [], []

    def run(seed):
        choose = random.Random(seed)
        try:
            for _ in range(60):
                keys = [f"k{index}" for index in choose.sample(range(len(ranks)), 2)]
                try:
                    with shelf.bank.lease(keys) as lease:
                        most.append(shelf.bank.used_bytes)
                        wrong.extend(
                            key
                            for key, each in lease.residents.items()
                            if not shelf.is_right(key, each)
                        )
                except InputError as error:  # the other threads have leased the rest
                    refused.append(error)
        except BaseException as error:  # noqa: BLE001  (a thread's end is not seen)
            wrong.append(error)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    assert not wrong
    assert max(most) <= 8 * ONE
    assert len(refused) < len(most)
    assert shelf.bank.used_bytes <= 8 * ONE
    for key in shelf.adapters:
        shelf.bank.drop(key)
    assert shelf.bank.used_bytes == 0


def test_an_error_of_the_reload_is_passed_on_as_it_is():
    shelf = Shelf(ONE)

    def gone(norms):
        raise StoreError("the folder is not there", where="somewhere")

    prepared = prepare(shelf.model, adapter(), where="mine")
    shelf.bank.put("mine", prepared, name="mine", reload=gone)
    shelf.put("k0", adapter())

    with pytest.raises(StoreError, match="the folder is not there"):
        shelf.bank.lease(["mine"])
