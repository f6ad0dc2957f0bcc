"""An adapter's numbers beside the layers: which bits, in which dtype, how many bytes."""

import gc
import subprocess
import sys
import weakref

import pytest
import torch
from torch import nn

from lora_hub.adapter.adapter import Adapter, Replaced
from lora_hub.adapter.update import Update
from lora_hub.errors import ComposeError
from lora_hub.runtime.laid_out import ALIGNED_BYTES
from lora_hub.runtime.prepare import prepare
from lora_hub.runtime.sites import Sites
from lora_hub.runtime.slab import reside
from tests.builders import tiny_model

ATTENTION = "model.layers.0.self_attn"
QKV = [f"{ATTENTION}.{name}_proj" for name in "qkv"]


def update(out, inp, *, rank=2, seed=0, dtype=torch.float32, **fields):
    generator = torch.Generator().manual_seed(seed)
    return Update(
        a=torch.randn(rank, inp, generator=generator).to(dtype),
        b=torch.randn(out, rank, generator=generator).to(dtype),
        scaling=torch.rand(rank, generator=generator, dtype=torch.float64) + 0.5,
        **fields,
    )


def for_model(model, targets, **given):
    modules = dict(model.named_modules())
    return Adapter(
        {
            target: update(*modules[target].weight.shape, seed=seed, **given)
            for seed, target in enumerate(targets)
        }
    )


def resident(model, adapter, **given):
    sites = Sites()
    prepared = prepare(model, adapter, where="mine")
    made = reside(prepared, sites, name="mine", key="key", **given)
    modules = dict(model.named_modules(remove_duplicate=False))
    numbers = {
        target: sites.number(modules[target])
        for target in adapter.updates
        if target in modules
    }
    return made, {target: made.at[number] for target, number in numbers.items()}


def one_layer(dtype=torch.float32, out=5, inp=3):
    torch.manual_seed(1)
    return nn.ModuleDict({"layer": nn.Linear(inp, out).to(dtype)})


def tensors(factors):
    named = (factors.a, factors.bt, factors.p, factors.q, factors.bias, factors.bias_scale)
    return [tensor for tensor in named if tensor is not None]


@pytest.mark.parametrize(
    ("held", "trained", "computed"),
    [
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.bfloat16, torch.float16, torch.float32),
        (torch.float16, torch.float16, torch.float16),
        (torch.float64, torch.float32, torch.float64),
        (torch.float8_e4m3fn, torch.bfloat16, torch.float32),
    ],
)
def test_factors_are_in_the_wider_dtype_and_rounded_once(held, trained, computed):
    model = one_layer(held)
    given = update(5, 3, rank=4, dtype=trained, p=torch.randn(5, dtype=torch.float64))

    _, made = resident(model, Adapter({"layer": given}))

    found = made["layer"]
    exact = (given.b.double() * given.scaling).T
    # Half a unit in the last place, and a little for the scaling and the product, which
    # are float32 first where nothing wider is computed in.
    bound = torch.finfo(computed).eps / 2 + 2 * torch.finfo(torch.float32).eps
    bound = torch.finfo(computed).eps * 2 if computed == torch.float64 else bound
    assert found.a.dtype == found.bt.dtype == found.p.dtype == computed
    assert torch.equal(found.a.double(), given.a.double())
    assert ((found.bt.double() - exact).abs() <= bound * exact.abs()).all()
    assert torch.equal(found.p, given.p.to(computed))


def test_one_slab_holds_every_tensor_and_next_to_nothing_else():
    model = tiny_model()
    adapter = for_model(model, [*QKV, "model.layers.1.mlp.up_proj"], rank=3)

    made, at = resident(model, adapter)

    held = [tensor for factors in at.values() for tensor in tensors(factors)]
    exact = sum(tensor.nbytes for tensor in held)
    assert len({tensor.untyped_storage().data_ptr() for tensor in held}) == 1
    assert exact <= made.nbytes < exact + ALIGNED_BYTES * len(held)


def test_slab_shares_no_memory_with_the_adapter():
    model = one_layer()
    given = update(5, 3)

    _, made = resident(model, Adapter({"layer": given}))
    given.a.zero_()
    given.b.zero_()

    assert made["layer"].a.abs().min() > 0
    assert made["layer"].bt.abs().min() > 0


def test_layers_that_read_one_input_have_their_a_side_by_side():
    model = tiny_model()
    adapter = for_model(model, reversed(QKV), rank=3)

    _, at = resident(model, adapter)

    q, k, v = (at[target].a for target in QKV)
    assert q.data_ptr() + q.nbytes == k.data_ptr()
    assert k.data_ptr() + k.nbytes == v.data_ptr()


def test_siblings_of_other_widths_keep_their_numbers():
    model = nn.ModuleDict({"to_q": nn.Linear(3, 4), "to_k": nn.Linear(7, 4)})
    adapter = for_model(model, ["to_q", "to_k"])

    _, at = resident(model, adapter)

    for target, given in adapter.updates.items():
        assert torch.equal(at[target].a, given.a)


def test_rows_of_an_embedding_lie_side_by_side():
    model = nn.ModuleDict({"words": nn.Embedding(9, 4)})
    given = update(4, 9, layer="embedding")

    _, at = resident(model, Adapter({"words": given}))

    assert at["words"].a.mT.is_contiguous()
    assert torch.equal(at["words"].a, given.a)


def test_experts_are_known_by_their_parameter():
    model = nn.ModuleDict({"experts": nn.Module()})
    model["experts"].register_parameter("up", nn.Parameter(torch.randn(2, 5, 3)))
    given = Update(
        a=torch.randn(2, 4, 3),
        b=torch.randn(2, 5, 4),
        scaling=torch.full((4,), 2.0, dtype=torch.float64),
        layer="experts",
    )

    made, _ = resident(model, Adapter({"experts.up": given}))

    found = made.experts[model["experts"], "up"]
    assert torch.equal(found.a, given.a)
    assert torch.equal(found.bt, (given.b * 2).mT)


def test_replaced_tensors_keep_dtype_and_bits_and_tied_places_share_them():
    model = nn.ModuleDict(
        {"words": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False)}
    )
    model["head"].weight = model["words"].weight
    new = Replaced(torch.randn(6, 4).half(), "embedding")

    made, _ = resident(model, Adapter({}, replaced={"words.weight": new}))

    words, head = (
        made.replaced[model[name], "weight"].tensor for name in ("words", "head")
    )
    assert words.dtype == torch.float16
    assert torch.equal(words, new.tensor)
    assert words.data_ptr() == head.data_ptr() != new.tensor.data_ptr()
    assert made.nbytes == new.tensor.nbytes


def test_a_module_that_is_a_target_under_two_names_gets_the_sum():
    model = one_layer()
    model["again"] = model["layer"]
    one, other = update(5, 3, seed=1), update(5, 3, rank=3, seed=2)

    _, made = resident(model, Adapter({"layer": one, "again": other}))

    exact = sum(each.b.double() * each.scaling @ each.a.double() for each in (one, other))
    found = made["layer"].bt.T.double() @ made["layer"].a.double()
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["a", "b", "p", "bias"])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused_by_target(name, number):
    vectors = {
        "p": torch.zeros(5, dtype=torch.float64),
        "bias": torch.zeros(5, dtype=torch.float64),
    }
    given = update(5, 3, **vectors)
    getattr(given, name).view(-1)[1] = number

    with pytest.raises(ComposeError, match="not finite") as caught:
        resident(one_layer(), Adapter({"layer": given}))
    assert caught.value.where == "layer"


def test_a_product_that_float16_cannot_hold_is_refused():
    given = update(5, 3, dtype=torch.float16)
    given.scaling.fill_(1e6)

    with pytest.raises(ComposeError, match=r"not finite in torch\.float16"):
        resident(one_layer(torch.float16), Adapter({"layer": given}))


def test_largest_is_of_all_but_a():
    given = update(5, 3, bias=torch.tensor([0, 0, -90.0, 0, 0], dtype=torch.float64))
    given.a[0, 0] = 1000

    _, made = resident(one_layer(), Adapter({"layer": given}))

    assert made["layer"].largest == 90


def test_an_update_without_factors_keeps_its_vectors():
    given = Update(
        a=torch.zeros(0, 0),
        b=torch.zeros(5, 0),
        scaling=torch.zeros(0, dtype=torch.float64),
        p=torch.randn(5, dtype=torch.float64),
    )

    _, made = resident(one_layer(torch.bfloat16), Adapter({"layer": given}))

    assert made["layer"].rank == 0
    assert torch.equal(made["layer"].p, given.p.bfloat16())


def test_made_in_inference_mode_it_can_be_trained_with_afterwards():
    with torch.inference_mode():
        given = update(5, 3)
        _, made = resident(one_layer(), Adapter({"layer": given}))

    assert not any(tensor.is_inference() for tensor in tensors(made["layer"]))
    x = torch.randn(2, 3, requires_grad=True)
    (x @ made["layer"].a.T @ made["layer"].bt).sum().backward()


def test_a_layer_whose_weight_comes_later_has_its_factors_where_it_is_computed():
    model = one_layer()
    model["layer"].to("meta")
    given = update(5, 3)

    _, made = resident(model, Adapter({"layer": given}))

    assert made["layer"].a.device.type == "cpu"
    assert torch.equal(made["layer"].a, given.a)


def test_memory_is_freed_when_the_last_tensor_is_let_go():
    model = one_layer(out=1024, inp=1024)
    gc.disable()
    try:
        made, at = resident(model, Adapter({"layer": update(1024, 1024, rank=300)}))
        freed = []
        weakref.finalize(at["layer"].a.untyped_storage(), freed.append, 1)
        bt = at["layer"].bt
        del made, at
        held = not freed
        del bt

        assert held
        assert freed
    finally:
        gc.enable()


# Apart, since what checks types in these tests looks into the mapping.
LAZY = """
import gc
import torch
from torch import nn
from lora_hub.adapter.adapter import Adapter
from lora_hub.adapter.update import Update
from lora_hub.runtime.prepare import prepare
from lora_hub.runtime.resident import Factors
from lora_hub.runtime.sites import Sites
from lora_hub.runtime.slab import reside

def made_by_now():
    return sum(type(each) is Factors for each in gc.get_objects())

model = nn.ModuleDict({name: nn.Linear(4, 4) for name in "abc"})
one = torch.ones(1, dtype=torch.float64)
updates = {name: Update(torch.ones(1, 4), torch.ones(4, 1), one) for name in "abc"}
resident = reside(
    prepare(model, Adapter(updates), where="mine"), Sites(), name="mine", key="key"
)
assert len(resident.at) == 3 and list(resident.at) == [0, 1, 2] and 2 in resident.at
assert resident.heaviest == torch.finfo(torch.float32).max
print(made_by_now())
first = resident.at[0]
assert resident.at[0] is first and resident.at.get(3) is None
print(made_by_now())
"""


def test_factors_of_layers_are_made_when_one_is_first_asked_for():
    ran = subprocess.run(
        [sys.executable, "-c", LAZY], capture_output=True, text=True, check=True
    )

    assert ran.stdout.split() == ["0", "3"]


@pytest.mark.parametrize("trained", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rank", [1, 4, 5])
def test_many_layers_built_alike_have_the_numbers_of_each_to_the_bit(trained, rank):
    layers = {f"{number}": nn.Linear(48, 32) for number in range(70)}
    model = nn.ModuleDict(layers)
    adapter = for_model(model, layers, rank=rank, dtype=trained)

    _, at = resident(model, adapter)

    for target, given in adapter.updates.items():
        assert torch.equal(at[target].a, given.a.float())
        # Every product of one float32 by another, rounded once.
        assert torch.equal(at[target].bt, (given.b.float() * given.scaling.float()).T)
        assert at[target].largest == at[target].bt.abs().max()


def test_factors_that_are_no_plain_rows_are_read_as_they_are():
    b = torch.randn(4, 5).bfloat16().mT
    given = Update(a=torch.randn(3, 4).mT, b=b, scaling=torch.ones(4, dtype=torch.float64))

    _, made = resident(one_layer(), Adapter({"layer": given}))

    assert torch.equal(made["layer"].a, given.a)
    assert torch.equal(made["layer"].bt, b.mT.float())


def test_factors_that_begin_anywhere_in_memory_are_read():
    b = torch.randn(21).bfloat16()[1:].view(5, 4)
    given = Update(a=torch.randn(4, 3), b=b, scaling=torch.ones(4, dtype=torch.float64))

    _, made = resident(one_layer(), Adapter({"layer": given}))

    assert torch.equal(made["layer"].bt, b.mT.float())


def test_a_sum_that_overflows_is_no_number_that_is_not_finite():
    given = update(5, 3, rank=4, dtype=torch.float16)
    given.a.fill_(6e4)

    _, made = resident(one_layer(torch.float16), Adapter({"layer": given}))

    assert torch.equal(made["layer"].a, given.a)


@pytest.mark.parametrize("number", [float("inf"), float("nan")])
def test_infinities_that_cancel_are_refused(number):
    given = update(5, 3)
    given.a.view(-1)[1], given.a.view(-1)[4] = number, -number

    with pytest.raises(ComposeError, match="not finite"):
        resident(one_layer(), Adapter({"layer": given}))
