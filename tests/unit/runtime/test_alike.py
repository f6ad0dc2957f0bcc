"""What adapters of one structure share: kept as long as the model is what it was."""

import pytest
import torch
from torch import nn

from lora_hub.adapter.adapter import Adapter
from lora_hub.adapter.update import Update
from lora_hub.errors import FitError
from lora_hub.runtime.alike import STRUCTURES, Structures, structure_of
from lora_hub.runtime.prepare import prepare
from lora_hub.runtime.sites import Sites
from lora_hub.runtime.slab import Plan


def update(out, inp, *, rank=2, seed=0, dtype=torch.float32, **fields):
    generator = torch.Generator().manual_seed(seed)
    return Update(
        a=torch.randn(rank, inp, generator=generator).to(dtype),
        b=torch.randn(out, rank, generator=generator).to(dtype),
        scaling=torch.rand(rank, generator=generator, dtype=torch.float64) + 0.5,
        **fields,
    )


def model():
    torch.manual_seed(1)
    return nn.ModuleDict({"one": nn.Linear(6, 4), "two": nn.Linear(4, 6)})


def adapter(**given):
    return Adapter({"one": update(4, 6, **given), "two": update(6, 4, **given)})


def test_the_second_adapter_of_a_structure_is_only_filled_in():
    base = model()
    structures, sites = Structures(base), Sites()
    first = prepare(base, adapter(seed=1), where="mine", structures=structures)
    Plan(first, sites)

    second = prepare(base, adapter(seed=2), where="mine", structures=structures)

    assert second.alike is first.alike is not None
    assert len(second.alike.layouts) == 1
    Plan(second, sites)
    assert len(second.alike.layouts) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_filled_in_with_its_own_numbers(dtype):
    base, given = model(), adapter(seed=2, dtype=dtype)
    structures, sites = Structures(base), Sites()
    Plan(
        prepare(base, adapter(seed=1, dtype=dtype), where="mine", structures=structures),
        sites,
    )

    known = Plan(prepare(base, given, where="mine", structures=structures), sites)
    fresh = Plan(prepare(base, given, where="mine"), sites)

    one, other = known.filled("mine", "key"), fresh.filled("mine", "key")
    assert known.nbytes == fresh.nbytes
    assert one.heaviest == other.heaviest
    for number in (0, 1):
        assert torch.equal(one.at[number].a, other.at[number].a)
        assert torch.equal(one.at[number].bt, other.at[number].bt)
        assert one.at[number].largest == other.at[number].largest


def test_its_updates_are_told_as_ever():
    base, given = model(), adapter(seed=2)
    structures = Structures(base)
    prepare(base, adapter(seed=1), where="mine", structures=structures)

    known = prepare(base, given, where="mine", structures=structures)

    fresh = prepare(base, given, where="mine")
    assert list(known.updates) == list(fresh.updates)
    assert len(known.updates) == 2
    for target, aimed in known.updates.items():
        assert aimed.update is given.updates[target]
        assert aimed.place.module is base[target]
        assert aimed.dtype == fresh.updates[target].dtype
    assert known.modules == fresh.modules
    assert known.notes == fresh.notes


def test_another_rank_dtype_or_target_is_another_structure():
    plain = structure_of(adapter())

    others = [
        adapter(rank=3),
        adapter(dtype=torch.bfloat16),
        Adapter({"one": update(4, 6)}),
    ]
    assert plain == structure_of(adapter(seed=5))
    assert all(structure_of(each) != plain for each in others)


@pytest.mark.parametrize("name", ["p", "q", "bias", "bias_scale", "magnitude"])
def test_what_is_more_than_a_product_is_not_kept(name):
    size = 6 if name == "q" else 4
    vector = {name: torch.ones(size, dtype=torch.float64)}

    assert structure_of(Adapter({"one": update(4, 6, **vector)})) is None


def test_a_layer_put_in_the_place_of_another_is_found():
    base = model()
    structures = Structures(base)
    prepare(base, adapter(), where="mine", structures=structures)
    base["one"] = nn.Linear(6, 4)

    again = prepare(base, adapter(), where="mine", structures=structures)

    assert again.updates["one"].place.module is base["one"]


def test_a_layer_that_is_gone_or_of_another_width_is_refused():
    base = model()
    structures = Structures(base)
    prepare(base, adapter(), where="mine", structures=structures)
    base["one"] = nn.Linear(7, 4)
    del base["two"]

    with pytest.raises(FitError, match="2 of 2 targets"):
        prepare(base, adapter(), where="mine", structures=structures)


def test_a_layer_that_was_widened_in_place_is_refused():
    base = model()
    structures = Structures(base)
    prepare(base, adapter(), where="mine", structures=structures)
    base["one"].in_features = 7

    with pytest.raises(FitError, match=r"shape \[4, 7\]"):
        prepare(base, adapter(), where="mine", structures=structures)


def test_a_tie_made_meanwhile_is_told():
    base = model()
    base["three"] = nn.Linear(6, 4)
    structures = Structures(base)
    before = prepare(base, adapter(), where="mine", structures=structures)
    base["three"].weight = base["one"].weight

    after = prepare(base, adapter(), where="mine", structures=structures)

    assert not before.notes
    assert after.notes == ("three shares the weight of one and is not changed",)


def test_weights_brought_to_another_dtype_are_computed_in_it():
    base = model()
    structures, sites = Structures(base), Sites()
    prepared = prepare(base, adapter(), where="mine", structures=structures)
    before = Plan(prepared, sites)
    base.double()

    after = Plan(prepared, sites)

    assert before.filled("mine", "key").at[0].bt.dtype == torch.float32
    assert after.filled("mine", "key").at[0].bt.dtype == torch.float64


def test_a_layer_of_two_names_gets_the_sum_each_time():
    base = model()
    base["again"] = base["one"]
    structures, sites = Structures(base), Sites()
    given = [
        Adapter({"one": update(4, 6, seed=seed), "again": update(4, 6, seed=seed + 1)})
        for seed in (1, 3)
    ]

    for each in given:
        made = prepare(base, each, where="mine", structures=structures)
        found = Plan(made, sites).filled("mine", "key").at[0]

        exact = sum(u.b.double() * u.scaling @ u.a.double() for u in each.updates.values())
        torch.testing.assert_close(
            found.bt.T.double() @ found.a.double(), exact, rtol=0, atol=1e-5
        )


def test_the_structures_kept_are_few():
    base = model()
    structures = Structures(base)

    for rank in range(1, STRUCTURES + 5):
        prepare(base, adapter(rank=rank), where="mine", structures=structures)

    first = structure_of(adapter(rank=1))
    last = structure_of(adapter(rank=STRUCTURES + 4))
    assert structures.now().find(first) is None
    assert structures.now().find(last) is not None
