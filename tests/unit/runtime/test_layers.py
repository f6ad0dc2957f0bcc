import pytest
import torch
from torch import nn

from lora_hub.adapter.adapter import Adapter, Replaced
from lora_hub.adapter.update import Update
from lora_hub.errors import FitError
from lora_hub.runtime.layers import places_of


class Scaled(nn.Embedding):
    def forward(self, x):
        return 3 * super().forward(x)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.renormed = nn.Embedding(7, 4, max_norm=1.0)
        self.scaled = Scaled(7, 4)
        self.conv = nn.Conv2d(4, 6, (3, 1))
        self.grouped = nn.Conv2d(4, 6, 3, groups=2)
        self.experts = nn.Parameter(torch.zeros(2, 3, 4))
        self.first = nn.Linear(4, 3)
        self.norm = nn.LayerNorm(3)
        self.attention = nn.MultiheadAttention(4, 2)


def update(out=3, inp=4):
    return Update(torch.zeros(1, inp), torch.zeros(out, 1), torch.ones(1).double())


def shaped(layer, out, inp, *experts, rank=2, **fields):
    a, b = torch.zeros(*experts, rank, inp), torch.zeros(*experts, out, rank)
    return Update(a, b, torch.ones(rank).double(), layer=layer, **fields)


def test_finds_the_layer_of_every_target():
    model = Model()

    found = places_of(model, Adapter({"first": update()}), where="x")

    assert found.targets["first"].module is model.first


@pytest.mark.parametrize(
    ("target", "given", "reason"),
    [
        ("second", update(), "second does not exist in the model"),
        ("norm", update(), "norm is a LayerNorm, expected a torch.nn.Linear"),
        ("first", update(5), "first has a weight of shape [3, 4], the update is [5, 4]"),
        (
            "attention.out_proj",
            update(4),
            "attention.out_proj is inside a torch.nn.MultiheadAttention, "  # noqa: ISC004
            "which does not call it",
        ),
    ],
)
def test_refuses_a_target_it_cannot_act_on_and_says_why(target, given, reason):
    with pytest.raises(FitError) as error:
        places_of(Model(), Adapter({"first": update(), target: given}), where="style/x")

    assert error.value.reasons == (reason,)
    assert error.value.where == "style/x"
    assert reason in error.value.problem


@pytest.mark.parametrize(
    ("target", "given"),
    [
        ("embedding", shaped("embedding", 4, 7)),
        ("conv", shaped("conv", 6, 12, kernel=(3, 1))),
        ("grouped", shaped("conv", 6, 36, kernel=(3, 3), groups=2)),
        ("experts", shaped("experts", 3, 4, 2)),
        ("first", shaped("linear", 3, 0, rank=0)),  # outputs alone are known
        ("conv", shaped("conv", 0, 4, rank=0)),  # input channels alone are
    ],
)
def test_finds_layers_of_every_kind(target, given):
    found = places_of(Model(), Adapter({target: given}), where="x")

    assert list(found.targets) == [target]


@pytest.mark.parametrize(
    ("target", "given", "reason"),
    [
        (
            "first",
            shaped("embedding", 3, 4),
            "first is a Linear, expected a torch.nn.Embedding",
        ),
        (
            "embedding",
            update(4, 7),
            "embedding is a Embedding, expected a torch.nn.Linear",
        ),
        (
            "renormed",
            shaped("embedding", 4, 7),
            "renormed is an embedding with max_norm, "  # noqa: ISC004
            "which changes its weight when it is called",
        ),
        (
            "scaled",
            shaped("embedding", 4, 7),
            "scaled is a Scaled, whose forward is its own and has no embed_scale",
        ),
        (
            "first",
            shaped("conv", 3, 4, kernel=(1,)),
            "first is a Linear, expected a torch.nn.Conv1d, 2d or 3d",
        ),
        (
            "conv",
            shaped("conv", 6, 12, kernel=(1, 3)),
            "conv has a kernel of [3, 1], the update is for [1, 3]",
        ),
        (
            "grouped",
            shaped("conv", 6, 36, kernel=(3, 3)),
            "grouped has 2 groups, the update is for 1",
        ),
        (
            "experts",
            shaped("experts", 4, 3, 2),
            "experts has a weight of shape [2, 3, 4], the update is [2, 4, 3]",
        ),
        (
            "first.experts",
            shaped("experts", 4, 3, 2),
            "first.experts does not exist in the model as a parameter",
        ),
        (
            "norm.weight",
            shaped("experts", 4, 3, 2),
            "norm.weight is a parameter of 1 axes, expected 2 or 3",
        ),
    ],
)
def test_refuses_a_layer_of_another_kind_or_shape(target, given, reason):
    with pytest.raises(FitError) as error:
        places_of(Model(), Adapter({target: given}), where="x")

    assert error.value.reasons == (reason,)


@pytest.mark.parametrize(
    ("name", "shape", "rows", "reason"),
    [
        ("last.weight", (3, 4), None, "last.weight does not exist in the model"),
        ("first.scale", (3, 4), None, "first.scale does not exist in the model"),
        (
            "first.weight",
            (3, 5),
            None,
            "first.weight is of shape [3, 4], the adapter's is [3, 5]",
        ),
        (
            "first.weight",
            (2, 5),
            (0, 1),
            "first.weight is of shape [3, 4], the adapter's is [2, 5]",
        ),
        (
            "first.weight",
            (2, 4),
            (0, 3),
            "first.weight has 3 rows, the adapter brings row 3",
        ),
        (
            "attention.out_proj.weight",
            (4, 4),
            None,
            "attention.out_proj.weight is inside a "  # noqa: ISC004
            "torch.nn.MultiheadAttention, which does not call its module",
        ),
    ],
)
def test_refuses_a_replaced_tensor_that_has_no_place(name, shape, rows, reason):
    new = Replaced(torch.zeros(shape), "modules_to_save", rows)

    with pytest.raises(FitError, match="1 of 2 targets cannot be applied") as error:
        places_of(Model(), Adapter({"first": update()}, replaced={name: new}), where="x")

    assert error.value.reasons == (reason,)


def test_counts_all_and_names_three():
    updates = {f"layer.{number}": update() for number in range(5)}

    with pytest.raises(
        FitError, match=r"5 of 5 targets cannot be applied: .*; and 2 more$"
    ):
        places_of(Model(), Adapter(updates), where="x")
