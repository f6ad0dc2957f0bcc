"""Adapters page between a GPU and pinned copies in the host: same bits, both budgets."""

import pytest
import torch
from torch import nn

from lora_hub.adapter.adapter import Adapter
from lora_hub.adapter.update import Update
from lora_hub.runtime.bank import Bank
from lora_hub.runtime.prepare import prepare
from lora_hub.runtime.sites import Sites

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator here"),
]

WIDTH = 512
ONE = 2 * WIDTH * 4  # bytes of rank 1


def adapter(seed, magnitude=None):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(1, WIDTH, generator=generator)
    b = torch.randn(WIDTH, 1, generator=generator)
    ones = torch.ones(1, dtype=torch.float64)
    return Adapter({"layer": Update(a, b, ones, magnitude=magnitude)})


def shelf(count, **budgets):
    """Return a bank with adapters k0, k1, … and the list of those read again."""
    model = nn.ModuleDict({"layer": nn.Linear(WIDTH, WIDTH)}).cuda()
    bank, read = Bank(Sites(), **budgets), []
    for index in range(count):
        given, key = adapter(index), f"k{index}"

        def reload(norms, given=given, key=key):
            read.append(key)
            return prepare(model, given, where=key, norms=norms)

        bank.put(key, prepare(model, given, where=key), name=key, reload=reload)
    return bank, read


def test_what_left_comes_back_from_the_copy_in_the_hosts_memory():
    bank, read = shelf(4, budget=2 * ONE, host_budget=3 * ONE)

    tiers = [bank.memory.adapters[f"k{index}"].tier for index in range(4)]

    assert tiers == ["disk", "host", "device", "device"]
    for index in (1, 0, 2, 3):
        with bank.lease([f"k{index}"]) as lease:
            found = lease.residents[f"k{index}"].at[0]
            given = adapter(index).updates["layer"]
            assert found.a.is_cuda
            assert torch.equal(found.a.cpu(), given.a)
            assert torch.equal(found.bt.cpu(), given.b.T)
    # k0 pushed the copy of k2 out, k2 that of k3.
    assert read == ["k0", "k2", "k3"]
    assert bank.used_bytes <= 2 * ONE
    assert bank.memory.host_bytes <= 3 * ONE


def test_the_device_holds_one_allocation_for_each_adapter():
    before = torch.cuda.memory_allocated()

    bank, _ = shelf(3, budget=None)

    weights = WIDTH * (WIDTH + 1) * 4
    assert bank.used_bytes == 3 * ONE
    assert torch.cuda.memory_allocated() - before <= weights + 3 * ONE + 4096
    assert bank.memory.host_bytes == 0


def test_dora_is_measured_on_the_device_and_its_norms_are_no_part_of_the_budget():
    model = nn.ModuleDict({"layer": nn.Linear(WIDTH, WIDTH)}).cuda()
    given = adapter(0, magnitude=torch.ones(WIDTH, dtype=torch.float64))

    prepared = prepare(model, given, where="dora")
    bank = Bank(Sites(), budget=10 * ONE)
    bank.put("dora", prepared, name="dora")

    plain = given.updates["layer"]
    exact = (
        model["layer"].weight.double().cpu() + plain.b.double() @ plain.a.double()
    ).norm(dim=1)
    torch.testing.assert_close(prepared.norms["layer"], exact, rtol=1e-12, atol=0)
    assert bank.memory.norms_bytes == WIDTH * 8
    assert bank.used_bytes == ONE + WIDTH * 4  # p
