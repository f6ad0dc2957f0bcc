"""Slabs that move as a whole: the same tensors somewhere else, copies within a budget."""

from dataclasses import fields

import torch
from torch import Tensor, nn

from lora_hub.adapter.adapter import Adapter, Replaced
from lora_hub.adapter.update import Update
from lora_hub.runtime.memory import LARGE_PAGE_BYTES, allocate
from lora_hub.runtime.paging import HostCopies, brought, staged
from lora_hub.runtime.prepare import prepare
from lora_hub.runtime.resident import Factors
from lora_hub.runtime.sites import Sites
from lora_hub.runtime.slab import Plan

CPU = torch.device("cpu")


def model():
    torch.manual_seed(0)
    held = nn.ModuleDict(
        {
            "attention": nn.ModuleDict({"q": nn.Linear(6, 4), "k": nn.Linear(6, 4)}),
            "words": nn.Embedding(9, 4),
            "up": nn.Conv1d(2, 4, 3),
            "experts": nn.Module(),
        }
    )
    held["experts"].register_parameter("down", nn.Parameter(torch.randn(2, 5, 3)))
    return held


def adapter():
    torch.manual_seed(1)

    def update(out, inp, rank=2, front=(), **given):
        return Update(
            a=torch.randn(*front, rank, inp).bfloat16(),
            b=torch.randn(*front, out, rank).bfloat16(),
            scaling=torch.full((rank,), 0.5, dtype=torch.float64),
            **given,
        )

    vector = torch.randn(4, dtype=torch.float64)
    return Adapter(
        {
            "attention.q": update(4, 6, p=vector, bias=vector, bias_scale=vector),
            "attention.k": update(4, 6, rank=3, q=torch.randn(6, dtype=torch.float64)),
            "words": update(4, 9, layer="embedding"),
            "up": update(4, 6, layer="conv", kernel=(3,)),
            "experts.down": update(5, 3, front=(2,), layer="experts"),
        },
        replaced={"up.bias": Replaced(torch.randn(4).half(), "bias")},
    )


def plan():
    return Plan(prepare(model(), adapter(), where="mine"), Sites())


def numbers(resident):
    """Return every tensor of an adapter, by what it is."""
    held = {("at", site): each for site, each in resident.at.items()}
    held |= {("experts", name): each for (_, name), each in resident.experts.items()}
    found = {
        (*where, field.name): value
        for where, each in held.items()
        for field in fields(Factors)
        if isinstance(value := getattr(each, field.name), Tensor)
    }
    replaced = {("new", name): each.tensor for (_, name), each in resident.replaced.items()}
    return found | replaced


def test_a_slab_that_moved_holds_the_same_tensors_laid_out_the_same():
    copy = staged(plan(), "mine", "key", (1, 2))
    before = numbers(copy.resident)

    moved = brought(copy)

    after = numbers(moved)
    assert len(after) == 15
    assert after.keys() == before.keys()
    for what, tensor in after.items():
        assert tensor.dtype == before[what].dtype
        assert tensor.stride() == before[what].stride()
        assert torch.equal(tensor, before[what])
    ends = {tensor.untyped_storage().data_ptr() for tensor in after.values()}
    assert len(ends) == 1
    assert ends.isdisjoint(each.untyped_storage().data_ptr() for each in before.values())
    assert (moved.name, moved.key, moved.tokens) == ("mine", "key", (1, 2))
    assert moved.nbytes == copy.resident.nbytes


def test_copies_leave_in_the_order_they_were_asked_for():
    copy = staged(plan(), "mine", "key", ())
    size = copy.resident.nbytes
    copies = HostCopies(2 * size)
    copies.keep("a", copy)
    copies.keep("b", copy)
    copies.get("a")

    copies.keep("c", copy)

    assert [key in copies for key in "abc"] == [True, False, True]
    assert copies.used_bytes == 2 * size
    copies.drop("a")
    copies.drop("b")
    assert copies.used_bytes == size


def test_a_copy_larger_than_the_budget_is_not_kept():
    copy = staged(plan(), "mine", "key", ())
    copies = HostCopies(copy.resident.nbytes - 1)

    copies.keep("a", copy)

    assert "a" not in copies
    assert copies.used_bytes == 0


def test_large_memory_is_aligned_writable_and_as_long_as_asked_for():
    for size in (0, 1, LARGE_PAGE_BYTES - 1, LARGE_PAGE_BYTES, 5_000_001):
        memory = allocate(size, CPU)
        memory.fill_(7)

        assert memory.shape == (size,)
        assert memory.dtype == torch.uint8
        assert memory.data_ptr() % 64 == 0
