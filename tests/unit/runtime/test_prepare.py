"""An adapter made ready for a model: DoRA resolved once, ties followed, nothing copied."""

import pytest
import torch
from torch import nn

from lora_hub.adapter.adapter import Adapter, Replaced
from lora_hub.adapter.update import Update
from lora_hub.errors import FitError
from lora_hub.runtime.prepare import prepare


def update(out, inp, *, rank=2, seed=0, dtype=torch.float32, **fields):
    generator = torch.Generator().manual_seed(seed)
    return Update(
        a=torch.randn(rank, inp, generator=generator).to(dtype),
        b=torch.randn(out, rank, generator=generator).to(dtype),
        scaling=torch.full((rank,), 0.5, dtype=torch.float64),
        **fields,
    )


def model(dtype=torch.float32):
    torch.manual_seed(3)
    return nn.ModuleDict({"layer": nn.Linear(6, 4).to(dtype)}).requires_grad_(
        requires_grad=False
    )


def dora(dtype=torch.float32):
    magnitude = torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=torch.float64)
    return Adapter({"layer": update(4, 6, dtype=dtype, magnitude=magnitude)})


def test_an_update_without_a_magnitude_is_taken_as_it_is():
    given = Adapter({"layer": update(4, 6)})

    prepared = prepare(model(), given, where="mine")

    assert prepared.updates["layer"].update is given.updates["layer"]
    assert not prepared.norms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dora_is_resolved_in_float64_and_its_norms_are_told(dtype):
    base, given = model(dtype), dora(dtype)

    prepared = prepare(base, given, where="mine")

    plain = given.updates["layer"]
    delta = (plain.b.double() * plain.scaling) @ plain.a.double()
    norms = (base["layer"].weight.double() + delta).norm(dim=1)
    found = prepared.updates["layer"].update
    torch.testing.assert_close(prepared.norms["layer"], norms, rtol=1e-14, atol=0)
    torch.testing.assert_close(found.p, plain.magnitude / norms - 1, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(
        found.b, plain.b.double() * (plain.magnitude / norms)[:, None], rtol=1e-13, atol=0
    )
    assert found.magnitude is None
    assert prepared.updates["layer"].dtype == dtype


def test_with_norms_of_before_the_weights_are_not_read():
    base, given = model(), dora()
    first = prepare(base, given, where="mine")
    base["layer"].weight.fill_(float("nan"))

    again = prepare(base, given, where="mine", norms=first.norms)

    for name in ("a", "b", "p", "scaling"):
        one = getattr(first.updates["layer"].update, name)
        assert torch.equal(one, getattr(again.updates["layer"].update, name))
    assert torch.equal(again.norms["layer"], first.norms["layer"])


def test_with_norms_of_before_the_weights_need_not_be_in_memory():
    base, given = model(), dora()
    norms = prepare(base, given, where="mine").norms
    base["layer"].to("meta")

    prepare(base, given, where="mine", norms=norms)

    with pytest.raises(FitError, match="not in memory"):
        prepare(base, given, where="mine")


def test_dora_on_a_replaced_weight_has_the_norms_of_that_weight():
    new = Replaced(torch.randn(4, 6), "modules_to_save")
    given = Adapter(dora().updates, replaced={"layer.weight": new})

    prepared = prepare(model(), given, where="mine")

    plain = given.updates["layer"]
    delta = (plain.b.double() * plain.scaling) @ plain.a.double()
    norms = (new.tensor.double() + delta).norm(dim=1)
    torch.testing.assert_close(prepared.norms["layer"], norms, rtol=1e-14, atol=0)


def test_a_tie_that_the_adapter_does_not_touch_says_nothing():
    base = model()
    base["words"] = nn.Embedding(5, 6)
    base["head"] = nn.Linear(6, 5, bias=False)
    base["head"].weight = base["words"].weight

    silent = prepare(base, Adapter({"layer": update(4, 6)}), where="mine")
    told = prepare(base, Adapter({"words": update(6, 5, layer="embedding")}), where="mine")

    assert not silent.notes
    assert told.notes == ("head shares the weight of words and is not changed",)


def test_a_tie_made_after_an_earlier_adapter_was_prepared_is_seen():
    base = model()
    base["words"] = nn.Embedding(5, 6)
    base["head"] = nn.Linear(6, 5, bias=False)
    given = Adapter({"words": update(6, 5, layer="embedding")})

    before = prepare(base, given, where="mine")
    base["head"].weight = base["words"].weight
    after = prepare(base, given, where="mine")

    assert not before.notes
    assert after.notes
