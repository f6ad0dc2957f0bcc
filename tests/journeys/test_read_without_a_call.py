"""Torch's own encoder reads its layers' tensors in one go: what replaces one acts too."""

import copy

import pytest
import torch
from torch import nn

import lora_hub
from lora_hub.adapter.adapter import Adapter, Replaced

SIZE = 8


def encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(SIZE, 2, 16, batch_first=True)
    return nn.Sequential(layer).eval().requires_grad_(requires_grad=False)


@pytest.mark.parametrize(
    "name",
    [
        "0.norm1.weight",
        "0.linear1.bias",
        "0.linear2.weight",
        "0.self_attn.in_proj_weight",
        "0.self_attn.in_proj_bias",
    ],
)
def test_what_replaces_a_tensor_of_an_encoder_acts_and_leaves_no_trace(name):
    model, wanted = encoder(), encoder()
    new = torch.randn_like(model.get_parameter(name))
    wanted.get_parameter(name).copy_(new)
    before = {path: dict(vars(each)) for path, each in model.named_modules()}
    hooks = {path: dict(each._forward_hooks) for path, each in model.named_modules()}
    bare = copy.deepcopy(model)
    host = lora_hub.attach(model)
    host.load(
        Adapter({}, replaced={name: Replaced(new, role="modules_to_save")}), as_="new"
    )
    x = torch.randn(2, 5, SIZE)

    host.use("new")
    found = model(x)
    host.use(None)

    assert torch.allclose(found, wanted(x), atol=1e-6)
    assert torch.equal(model(x), bare(x))
    assert before == {path: dict(vars(each)) for path, each in model.named_modules()}
    assert hooks == {
        path: dict(each._forward_hooks) for path, each in model.named_modules()
    }
