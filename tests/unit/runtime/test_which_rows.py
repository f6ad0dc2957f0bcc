"""Rows of a batch where they are hard to tell: right, or refused with the layer named."""

import pytest
import torch
from torch import nn

import lora_hub
from lora_hub.adapter.adapter import Adapter
from lora_hub.adapter.update import Update
from lora_hub.errors import InputError
from tests import nets

SIZE = 8


def hosted(model, target):
    host = lora_hub.attach(model.eval().requires_grad_(requires_grad=False))
    layer = model.get_submodule(target)
    host.load(Adapter({target: nets.update(layer, 3, 1)}), as_="one")
    return host


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_far_apart_give_each_row_what_it_gets_alone(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64, bias=False)).to(dtype)
    # What `a` gives times the weight is more than float16 can hold; the update is not.
    a, b = 4 * torch.randn(4, 64), 1e-4 * torch.randn(64, 4)
    change = Update(a.to(dtype), b.to(dtype), torch.ones(4, dtype=torch.float64))
    host = lora_hub.attach(model.requires_grad_(requires_grad=False))
    host.load(Adapter({"0": change}), as_="one")
    x = torch.randn(3, 8, 64).to(dtype)
    weights = [3000.0, 0.7, 1e-3]
    wide = model[0].weight.double()

    with torch.no_grad(), host.rows([{"one": weight} for weight in weights]):
        found = model(x)

    for row, weight in enumerate(weights):
        changed = wide + weight * change.b.double() @ change.a.double()
        wanted = x[row].double() @ changed.T
        with torch.no_grad(), host.using({"one": weight}):
            alone = model(x[row : row + 1])[0]
        nets.check_is_as_exact_as_plain(found[row], wanted, alone, dtype)


@pytest.mark.parametrize("entries", [["one", None, "one"], ["one", {"one": 0.5}, "one"]])
def test_rows_seen_in_inference_mode_can_be_trained_with_afterwards(entries):
    model = nn.Sequential(nn.Linear(SIZE, SIZE))
    host = hosted(model, "0")
    x = torch.randn(3, 5, SIZE, requires_grad=True)

    with host.rows(entries):
        with torch.inference_mode():
            wanted = model(x)
        found = model(x)
        found.sum().backward()

    assert torch.allclose(found, wanted.clone(), atol=1e-6)
    assert x.grad.abs().sum() > 0


class Positions(nn.Module):
    """Adds an embedding of where tokens stand, told once for all rows."""

    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(16, SIZE), nn.Embedding(16, SIZE)

    def forward(self, ids):
        return self.words(ids) + self.places(torch.arange(ids.shape[1]))


@pytest.mark.parametrize("tokens", [2, 3, 4])
def test_positions_are_not_taken_for_rows(tokens):
    model = Positions()
    host = hosted(model, "places")
    ids = torch.arange(3 * tokens).reshape(3, tokens)

    with host.rows(["one", None, "one"]), pytest.raises(InputError) as error:
        model(ids)

    assert error.value.where == "places"


class Experts(nn.Module):
    """Sends each token to one of several layers."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(SIZE, SIZE) for _ in range(2))
        self.shared_expert = nn.Linear(SIZE, SIZE)

    def forward(self, x):
        flat = x.flatten(0, 1)
        out = self.shared_expert(flat)
        for number, expert in enumerate(self.experts):
            mine = torch.nonzero((flat[:, 0] > 0) == bool(number)).flatten()
            if len(mine):
                out = out.index_add(0, mine, expert(flat[mine]))
        return out.view_as(x)


@pytest.mark.parametrize("sent", range(1, 9))
def test_tokens_sent_to_an_expert_are_not_taken_for_rows(sent):
    model = Experts()
    host = hosted(model, "experts.1")
    x = torch.randn(2, 4, SIZE)
    x[..., 0] = torch.where(torch.arange(8) < sent, 1.0, -1.0).reshape(2, 4)

    with host.rows(["one", None]), pytest.raises(InputError) as error:
        model(x)

    assert error.value.where == "experts.1"


def test_an_expert_that_sees_all_tokens_is_told_by_rows():
    model = Experts()
    host = hosted(model, "shared_expert")
    x = torch.randn(2, 4, SIZE)
    with torch.no_grad():
        bare = model(x)
        with host.using("one"):
            changed = model(x)

        with host.rows(["one", None]):
            found = model(x)

    assert torch.allclose(found, torch.stack([changed[0], bare[1]]), atol=1e-6)
