"""A twin's forward sees other tensors; the module has its own at any time."""

import functools

import pytest
import torch
from torch import nn

from lora_hub.errors import FitError
from lora_hub.runtime.twin import forward_of, run

OUT, INP = 4, 3
X = torch.ones(2, INP)


def ran(module, tensors, *args, **kwargs):
    return run(forward_of(module, where="it"), module, tensors, args, kwargs)


class Layer(nn.Linear):
    """A layer that looks at the real one while it runs, sets things, and may fail."""

    def __init__(self):
        super().__init__(INP, OUT)
        self.calls = 0
        self.real = [self]
        self.seen = []

    def forward(self, x, *, fails=False):
        self.calls += 1
        self.seen.append((self.weight, self.real[0].weight))
        self.last = x
        if fails:
            raise ZeroDivisionError
        return super().forward(x)


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return Layer()


@pytest.fixture
def new():
    torch.manual_seed(1)
    return torch.randn(OUT, INP)


def test_the_forward_sees_the_new_tensor_and_the_module_has_its_own(layer, new):
    own = layer.weight

    found = ran(layer, {"weight": new}, X)

    assert torch.equal(found, nn.functional.linear(X, new, layer.bias))
    assert [(one is new, other is own) for one, other in layer.seen] == [(True, True)]
    assert layer.weight is own


def test_what_a_forward_sets_is_set_on_the_module_also_when_it_fails(layer, new):
    ran(layer, {"weight": new}, X)
    with pytest.raises(ZeroDivisionError):
        ran(layer, {"weight": new}, X, fails=True)

    assert layer.calls == 2
    assert layer.last is X
    assert "weight" not in layer.__dict__


def test_buffers_are_replaced_and_those_the_forward_sets_are_kept(new):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.ones(3))
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x):
            self.count = self.count + 1
            return x * self.scale

    module = Counting()

    found = ran(module, {"scale": torch.full((3,), 2.0)}, X)

    assert torch.equal(found, 2 * X)
    assert module.count == 1
    assert torch.equal(module.scale, torch.ones(3))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_a_layer_that_keeps_its_weights_a_second_time_sees_the_new_ones(kind):
    torch.manual_seed(0)
    module, other = kind(3, 4), kind(3, 4)
    x = torch.randn(5, 2, 3)
    with torch.no_grad():
        other.bias_ih_l0.copy_(module.bias_ih_l0)
        other.bias_hh_l0.copy_(module.bias_hh_l0)
        other.weight_hh_l0.copy_(module.weight_hh_l0)

    found, _ = ran(module, {"weight_ih_l0": other.weight_ih_l0}, x)

    assert torch.equal(found, other(x)[0])
    assert not torch.equal(found, module(x)[0])


def test_runs_the_forward_that_another_tool_bound_to_the_module(layer, new):
    def twice(self, x):
        return 2 * nn.functional.linear(x, self.weight)

    wanted = 2 * X @ new.T
    layer.forward = twice.__get__(layer)
    assert torch.equal(ran(layer, {"weight": new}, X), wanted)
    layer.forward = functools.partial(twice, layer)
    assert torch.equal(ran(layer, {"weight": new}, X), wanted)


def test_refuses_a_forward_it_cannot_run_on_a_twin(layer):
    layer.forward = Layer().forward  # bound to another one

    with pytest.raises(FitError, match="another tool gave the layer a forward") as error:
        forward_of(layer, where="model.head")

    assert error.value.where == "model.head"


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_refuses_a_module_of_torchscript(layer):
    module = torch.jit.trace(nn.Linear(INP, OUT), X)

    with pytest.raises(FitError, match="TorchScript"):
        forward_of(module, where="it")


def test_gradients_go_through(layer, new):
    x = X.clone().requires_grad_()

    ran(layer, {"weight": new}, x).sum().backward()

    assert torch.equal(x.grad, new.sum(0).expand(2, INP))
