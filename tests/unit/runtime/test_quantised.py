"""Quantised layers. The oracle is what the layer gives by itself, plus a dense change.

The numbers that a layer computes with are told by the layer: it is given the unit matrix.
"""

from typing import Any, Self

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import return_and_correct_aliasing

from lora_hub.adapter.adapter import Adapter, Replaced
from lora_hub.adapter.update import Update
from lora_hub.base.fit import check_fit
from lora_hub.errors import FitError, InconclusiveError
from lora_hub.manifest.document import Base, BaseConfig, BaseTarget
from lora_hub.runtime.base_view import ModelBase
from lora_hub.runtime.host import Host
from lora_hub.runtime.quantised import dtype_of, kind_of, numbers_of, shape_of

INP, OUT, RANK = 64, 96, 4


def by_torchao(bits: int) -> Any:
    def quantised(layer: nn.Linear) -> nn.Module:
        ao = pytest.importorskip("torchao.quantization")
        config = (
            ao.Int8WeightOnlyConfig()
            if bits == 8
            else ao.IntxWeightOnlyConfig(
                weight_dtype=torch.int4, granularity=ao.PerGroup(32)
            )
        )
        holder = nn.Sequential(layer)
        ao.quantize_(holder, config)
        return holder[0]

    return quantised


def by_bitsandbytes(kind: str) -> Any:
    def quantised(layer: nn.Linear) -> nn.Module:
        bnb = pytest.importorskip("bitsandbytes")
        dtype = layer.weight.dtype
        made = (
            bnb.nn.Linear8bitLt(INP, OUT, has_fp16_weights=False)
            if kind == "int8"
            else bnb.nn.Linear4bit(INP, OUT, compute_dtype=dtype, quant_type=kind)
        ).to(dtype)
        made.load_state_dict(layer.state_dict())
        return made.to("cpu")  # which packs it

    return quantised


class Packed(torch.Tensor):
    """A weight of eight bits by a library that nobody knows: it says how to multiply."""

    @staticmethod
    def __new__(cls, packed: torch.Tensor, scale: float) -> Self:
        return torch.Tensor._make_wrapper_subclass(cls, packed.shape, dtype=torch.float32)

    def __init__(self, packed: torch.Tensor, scale: float) -> None:
        self.packed, self.scale = packed, scale

    def __tensor_flatten__(self) -> Any:
        return ["packed"], self.scale

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ):
        if function is functional.linear:
            x, weight, *rest = args
            return functional.linear(x, weight.packed.float() * weight.scale, *rest)
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any, kwargs: Any = None):
        if function is torch.ops.aten.detach.default:
            made = Packed(args[0].packed, args[0].scale)
            return return_and_correct_aliasing(function, args, kwargs or {}, made)
        raise NotImplementedError(str(function))


def by_a_stranger(layer: nn.Linear) -> nn.Module:
    weight = layer.weight.detach()
    scale = float(weight.abs().max()) / 127
    packed = Packed((weight / scale).round().to(torch.int8), scale)
    layer.weight = nn.Parameter(packed, requires_grad=False)
    return layer


KNOWN = {
    "torchao, 8 bits": by_torchao(8),
    "torchao, 4 bits": by_torchao(4),
    "bitsandbytes, nf4": by_bitsandbytes("nf4"),
    "bitsandbytes, fp4": by_bitsandbytes("fp4"),
    "bitsandbytes, int8": by_bitsandbytes("int8"),
}
known = pytest.mark.parametrize("by", KNOWN.values(), ids=KNOWN.keys())
every = pytest.mark.parametrize(
    "by", [*KNOWN.values(), by_a_stranger], ids=[*KNOWN.keys(), "a stranger"]
)


def model(by: Any, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(by(nn.Linear(INP, OUT).to(dtype).requires_grad_(False)))


def adapter(name: str = "one", seed: int = 1, **fields: Any) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    update = Update(
        a=torch.randn(RANK, INP, generator=generator) / 8,
        b=torch.randn(OUT, RANK, generator=generator) / 2,
        scaling=torch.full((RANK,), 0.5, dtype=torch.float64),
        **fields,
    )
    return Adapter(name=name, updates={"0": update})


def dense(given: Adapter) -> torch.Tensor:
    own = given.updates["0"]
    return own.b.double() @ (own.scaling[:, None] * own.a.double())


def inputs(rows: int = 3) -> torch.Tensor:
    return torch.randn(rows, 5, INP, generator=torch.Generator().manual_seed(9))


def weight_of(base: nn.Module) -> torch.Tensor:
    """Return the weight the layer computes with, asked of the layer."""
    bias = base[0].bias
    return (base(torch.eye(INP)) - bias).T.double()


@every
def test_an_adapter_adds_to_what_the_quantised_layer_gives(by):
    base, x, one = model(by), inputs(), adapter()
    alone = base(x)
    host = Host(base)

    host.load(one)
    host.use({"one": 0.7})
    found = base(x)

    want = alone.double() + 0.7 * (x.double() @ dense(one).T)
    plain = alone + 0.7 * (x @ dense(one).float().T)
    bound = 2 * (plain.double() - want).abs().max() + 1e-6
    assert (found.double() - want).abs().max() <= bound
    host.detach()
    assert torch.equal(base(x), alone)


@known
def test_bfloat16_is_as_near_as_plain_torch(by):
    base, x, one = model(by, torch.bfloat16), inputs().bfloat16(), adapter()
    alone = base(x)
    host = Host(base)

    host.load(one)
    host.use("one")
    found = base(x)

    want = alone.double() + x.double() @ dense(one).T
    own = one.updates["0"]
    plain = alone + (x @ own.a.bfloat16().T) @ (0.5 * own.b).bfloat16().T
    assert found.dtype == torch.bfloat16
    assert (found.double() - want).norm() <= 2 * (plain.double() - want).norm()


@every
def test_each_row_has_its_own_adapter_and_a_bare_one_is_the_base(by):
    base, x = model(by), inputs()
    one, two = adapter(), adapter("two", 2)
    alone = base(x)
    host = Host(base)
    host.load(one)
    host.load(two)

    with host.rows(["two", None, {"one": 2.0, "two": -1.0}]):
        found = base(x)

    first = alone[0].double() + x[0].double() @ dense(two).T
    last = alone[2].double() + x[2].double() @ (2 * dense(one) - dense(two)).T
    assert torch.equal(found[1], alone[1])
    torch.testing.assert_close(found[0].double(), first, rtol=0, atol=1e-5)
    torch.testing.assert_close(found[2].double(), last, rtol=0, atol=1e-5)


@known
def test_dora_is_measured_against_the_numbers_the_layer_computes_with(by):
    base, x = model(by), inputs()
    one = adapter(magnitude=torch.linspace(0.5, 2, OUT, dtype=torch.float64))
    weight, bias = weight_of(base), base[0].bias.double()
    host = Host(base)

    host.load(one)
    host.use("one")
    found = base(x)

    changed = weight + dense(one)
    scale = one.updates["0"].magnitude / changed.norm(dim=1)
    want = x.double() @ (scale[:, None] * changed).T + bias
    torch.testing.assert_close(found.double(), want, rtol=0, atol=2e-5)


@known
def test_an_update_that_scales_inputs_scales_those_of_the_quantised_weight(by):
    base, x = model(by), inputs()
    q = torch.linspace(-0.5, 0.5, INP, dtype=torch.float64)
    one = adapter(q=q)
    weight, bias = weight_of(base), base[0].bias.double()
    host = Host(base)

    host.load(one)
    host.use("one")
    found = base(x)

    want = x.double() @ (weight * (1 + q) + dense(one)).T + bias
    torch.testing.assert_close(found.double(), want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("fields", [{"magnitude": OUT}, {"q": INP}], ids=["DoRA", "q"])
def test_refuses_what_needs_numbers_that_a_stranger_packed(fields):
    ((name, size),) = fields.items()
    one = adapter(**{name: torch.ones(size, dtype=torch.float64)})

    with pytest.raises(FitError, match="numbers of the weight, a Packed"):
        Host(model(by_a_stranger)).load(one)


@every
def test_refuses_to_replace_or_to_merge_into_a_packed_tensor(by):
    base = model(by)
    host = Host(base)
    new = Replaced(torch.zeros(OUT, INP), "modules_to_save")

    with pytest.raises(FitError, match="is quantised"):
        host.load(Adapter(name="new", updates={}, replaced={"0.weight": new}))
    host.load(adapter())
    with pytest.raises(FitError, match="the weight is held as"):
        host.merge("one")

    assert not host.used


@known
def test_numbers_are_those_the_layer_computes_with(by):
    base = model(by)
    layer = base[0]

    numbers = numbers_of(layer.weight, layer)

    assert kind_of(layer.weight) is not None
    assert shape_of(layer.weight) == (OUT, INP) == tuple(numbers.shape)
    torch.testing.assert_close(numbers.double(), weight_of(base), rtol=0, atol=1e-6)


@known
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_computed_in_is_the_dtype_of_the_layer(by, dtype):
    layer = model(by, dtype)[0]

    assert dtype_of(layer.weight, layer) == dtype


def recorded() -> Base:
    """Return the base of an adapter made on the layer as it was before."""
    original = ModelBase(model(lambda layer: layer))
    dtype, shape = original.tensors["0.weight"]
    digest = original.digest("0.weight")
    target = BaseTarget(module="0", dtype=dtype, shape=shape, sha256=digest)
    zero = "sha256:" + "0" * 64
    return Base(
        root=zero, struct=zero, policy="targets", config=BaseConfig(), targets=(target,)
    )


@every
def test_names_and_shapes_of_a_quantised_base_can_be_compared(by):
    fit = check_fit(recorded(), ModelBase(model(by)), policy="struct")

    assert fit.policy == "struct"


@every
def test_contents_of_a_quantised_base_are_never_taken_for_the_same(by):
    with pytest.raises((FitError, InconclusiveError), match=r"quantised|the base holds I8"):
        check_fit(recorded(), ModelBase(model(by)), policy="targets")
