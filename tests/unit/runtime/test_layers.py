import pytest
import torch
from torch import nn

from lora_hub.adapter.update import Update
from lora_hub.errors import FitError
from lora_hub.runtime.layers import layers_of


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 3)
        self.norm = nn.LayerNorm(3)
        self.attention = nn.MultiheadAttention(4, 2)


def update(out=3, inp=4):
    return Update(torch.zeros(1, inp), torch.zeros(out, 1), torch.ones(1).double())


def test_finds_the_layer_of_every_target():
    model = Model()

    assert layers_of(model, {"first": update()}, where="x") == {"first": model.first}


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
        layers_of(Model(), {"first": update(), target: given}, where="style/x")

    assert error.value.reasons == (reason,)
    assert error.value.where == "style/x"
    assert reason in error.value.problem


def test_counts_all_and_names_three():
    updates = {f"layer.{number}": update() for number in range(5)}

    with pytest.raises(
        FitError, match=r"5 of 5 targets cannot be applied: .*; and 2 more$"
    ):
        layers_of(Model(), updates, where="x")
