"""What one process does with its part of a layer, and what it refuses.

One process of three, whose fellows are not there: torch's own stand-in for them answers
every exchange. What needs their numbers is tried in `journeys/test_tensor_parallel.py`.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from lora_hub.adapter.adapter import Adapter, Replaced
from lora_hub.adapter.update import Update
from lora_hub.errors import FitError, InconclusiveError, InputError
from lora_hub.runtime.base_view import ModelBase
from lora_hub.runtime.host import Host
from lora_hub.runtime.sharded import refusal, spread_of

INP, OUT = 8, 10


@pytest.fixture(params=[0, 1, 2])
def mesh(request: pytest.FixtureRequest) -> Iterator[Any]:
    dist.init_process_group("fake", store=FakeStore(), rank=request.param, world_size=3)
    yield init_device_mesh("cpu", (3,))
    dist.destroy_process_group()


def spread(layer: nn.Module, mesh: Any, *placements: Placement) -> nn.Module:
    weight = distribute_tensor(layer.weight.detach(), mesh, placements, src_data_rank=None)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def adapter(**fields: Any) -> Adapter:
    generator = torch.Generator().manual_seed(1)
    update = Update(
        a=torch.randn(2, INP, generator=generator),
        b=torch.randn(OUT, 2, generator=generator),
        scaling=torch.ones(2, dtype=torch.float64),
        **fields,
    )
    return Adapter(name="one", updates={"0": update})


def model(layer: nn.Module) -> nn.Sequential:
    return nn.Sequential(layer)


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(INP, OUT, bias=False)


def test_a_layer_in_one_piece_is_not_spread():
    assert spread_of(linear()) is None
    assert refusal(linear(), "linear", has_q=True) is None


@pytest.mark.parametrize("size", range(1, 12))
def test_the_share_of_a_process_is_that_of_a_dtensor(mesh, size):
    layer = spread(linear(), mesh, Shard(0))
    numbers = torch.arange(size)

    share = spread_of(layer).whole.share(size)

    wanted = distribute_tensor(numbers, mesh, [Shard(0)], src_data_rank=None).to_local()
    assert torch.equal(numbers[share], wanted)


def test_a_part_of_the_outputs_gains_that_part_of_the_change(mesh):
    """The layer's own forward is torch's on local numbers, as transformers has it."""
    given = adapter()
    layer = spread(linear(), mesh, Shard(0))
    own = layer.weight.to_local()
    layer.forward = lambda x: x @ own.T
    x = torch.randn(3, INP)
    base = model(layer)
    host = Host(base)

    host.load(given)
    host.use("one")
    found = base(x)

    update = given.updates["0"]
    share = spread_of(layer).whole.share(OUT)
    want = x.double() @ (own.double() + update.b.double()[share] @ update.a.double()).T
    torch.testing.assert_close(found.double(), want, rtol=0, atol=1e-5)


def test_refuses_a_mesh_of_two_axes():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    try:
        layer = spread(linear(), init_device_mesh("cpu", (2, 2)), Replicate(), Shard(0))
        with pytest.raises(FitError, match="over a mesh of 2 axes, expected one"):
            Host(model(layer)).load(adapter())
    finally:
        dist.destroy_process_group()


def test_refuses_several_projections_that_are_cut_one_by_one(mesh):
    layer = linear()
    strided = _StridedShard(0, split_factor=2)
    part = distribute_tensor(layer.weight.detach(), mesh, [Shard(0)], src_data_rank=None)
    packed = DTensor.from_local(
        part.to_local(), mesh, [strided], run_check=False, shape=(OUT, INP), stride=(INP, 1)
    )
    layer.weight = nn.Parameter(packed, requires_grad=False)

    with pytest.raises(FitError, match="expected Shard or Replicate"):
        Host(model(layer)).load(adapter())


def test_refuses_what_scales_inputs_and_what_replaces_a_part(mesh):
    layer = spread(linear(), mesh, Shard(1))
    host = Host(model(layer))
    new = Replaced(torch.zeros(OUT, INP), "modules_to_save")

    with pytest.raises(FitError, match="the update scales its inputs"):
        host.load(adapter(q=torch.ones(INP, dtype=torch.float64)))
    with pytest.raises(FitError, match="is spread over processes, and would have to be"):
        host.load(Adapter(name="new", updates={}, replaced={"0.weight": new}))


def test_refuses_convolutions_and_experts(mesh):
    conv = spread(nn.Conv1d(4, 4, 1), mesh, Shard(0))

    assert "linear layers and embeddings" in str(refusal(conv, "conv", has_q=False))
    assert "linear layers and embeddings" in str(
        refusal(linear_of(mesh), "experts", has_q=False)
    )


def linear_of(mesh: Any) -> nn.Module:
    return spread(linear(), mesh, Shard(0))


def test_refuses_to_merge_and_to_compare_contents(mesh):
    layer = linear_of(mesh)
    host = Host(model(layer))
    host.load(adapter())

    with pytest.raises(FitError, match="the weight is held as a DTensor"):
        host.merge("one")
    with pytest.raises(InconclusiveError, match="spread over"):
        ModelBase(model(layer)).digest("0.weight")


@pytest.mark.parametrize(
    ("x", "y"),
    [((3, INP - 1), (3, OUT)), ((3, INP), (3, OUT + 1)), ((3, INP), (2, OUT))],
    ids=["inputs", "outputs", "tokens"],
)
def test_refuses_a_layout_that_is_not_known(mesh, x, y):
    layer = linear_of(mesh)
    layer.forward = lambda _: torch.zeros(y)
    base = model(layer)
    host = Host(base)
    host.load(adapter())
    host.use("one")

    with pytest.raises(InputError, match=r"which part of its output this is"):
        base(torch.zeros(x))


def test_refuses_an_output_that_is_yet_to_be_summed(mesh):
    layer = linear_of(mesh)
    layer.forward = lambda _: DTensor.from_local(torch.zeros(3, OUT), mesh, [Partial()])
    base = model(layer)
    host = Host(base)
    host.load(adapter())
    host.use("one")

    with pytest.raises(InputError, match=r"gave \[3, 10\] as \[Partial"):
        base(torch.zeros(3, INP))
