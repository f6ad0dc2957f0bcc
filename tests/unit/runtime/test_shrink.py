"""Layers that read one input share a product; the truth is dense and in float64."""

import copy

import pytest
import torch
from torch import nn

import lora_hub
from tests import nets

SIZE = 8
NAMES = ("q_proj", "k_proj", "v_proj")


class Attention(nn.Module):
    """Three layers, called as `calls` says."""

    def __init__(self, calls):
        super().__init__()
        torch.manual_seed(0)
        for name in NAMES:
            setattr(self, name, nn.Linear(SIZE, SIZE, bias=False))
        self.calls = calls

    def forward(self, x):
        return self.calls(self, x.clone())


def all_of_one(net, x):
    return net.q_proj(x) + net.k_proj(x) * net.v_proj(x)


def queries_of_another(net, x):
    return net.q_proj(x) + net.k_proj(x.flip(0)) * net.v_proj(x.flip(0))


def written_to_in_between(net, x):
    total = net.q_proj(x)
    total = total + net.k_proj(x.mul_(3))
    return total + net.v_proj(x.add_(1))


def one_buffer_for_all(net, x):
    buffer = torch.empty_like(x)
    total = 0
    for step in range(3):
        buffer.copy_(x).mul_(step + 1)
        total = total + net.q_proj(buffer)
    return total + net.k_proj(buffer)


@pytest.mark.parametrize("mode", nets.MODES)
@pytest.mark.parametrize(
    "calls", [all_of_one, queries_of_another, written_to_in_between, one_buffer_for_all]
)
def test_every_layer_gets_the_product_of_what_it_reads(calls, mode):
    net = Attention(calls).eval().requires_grad_(requires_grad=False)
    adapter = nets.adapter(net, dict.fromkeys(NAMES, 3), seed=1)
    wide = copy.deepcopy(net).double()
    for name in NAMES:
        change, _ = nets.change_of(getattr(net, name), adapter.updates[name])
        getattr(wide, name).weight += change
    host = lora_hub.attach(net)
    host.load(adapter, as_="one")
    host.use("one")

    with nets.MODES[mode]():
        x = torch.randn(4, 8, SIZE)
        found, wanted = net(x), wide(x.double())

    assert torch.allclose(found.double(), wanted, rtol=1e-5, atol=1e-4)
