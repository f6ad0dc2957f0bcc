"""`lora_hub::add` and `lora_hub::add_backward` keep what torch asks of operators."""

import gc

import pytest
import torch
from torch import nn

from lora_hub.adapter.adapter import Adapter
from lora_hub.adapter.update import Update
from lora_hub.errors import InputError
from lora_hub.runtime.host import Host

add = torch.ops.lora_hub.add.default
add_backward = torch.ops.lora_hub.add_backward.default

ROWS, TOKENS, INP, OUT, WORDS = 3, 2, 5, 4, 7


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(WORDS, INP)
        self.linear = nn.Linear(INP, OUT)

    def forward(self, x):
        return self.linear(self.words(x))


def normal(*shape, seed=0):
    made = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=made, dtype=torch.float64)


def update(rank, inp, out, seed, **fields):
    ones = torch.ones(rank, dtype=torch.float64)
    vectors = {name: normal(out if name == "p" else inp, seed=seed + 2) for name in fields}
    return Update(
        normal(rank, inp, seed=seed), normal(out, rank, seed=seed + 1), ones, **vectors
    )


@pytest.fixture
def attached():
    torch.manual_seed(0)
    net = Net().double().requires_grad_(requires_grad=False)
    host = Host(net, reserve=("linear", "words"))
    for seed, name in enumerate(("one", "two")):
        linear = update(2 + seed, INP, OUT, seed, p=True, q=True)
        words = Update(
            normal(2, WORDS, seed=8),
            normal(INP, 2, seed=9),
            torch.ones(2, dtype=torch.float64),
            layer="embedding",
        )
        host.load(Adapter({"linear": linear, "words": words}), as_=name)
    yield net, host
    host.detach()


def numbers(host, layer):
    return host._hooks._number, host._sites.number(layer)


def tensors(net, *, grad=False):
    x = normal(ROWS, TOKENS, INP, seed=3).requires_grad_(grad)
    y = net.linear.forward(x.detach()).requires_grad_(grad)
    return x, y


WHAT = [
    [None, None, None],
    ["one"] * 3,
    ["one", None, "two"],
    [{"one": 0.5, "two": -1.0}, {"one": 2.0}, None],
]


@pytest.mark.parametrize("entries", WHAT)
@pytest.mark.parametrize("grad", [False, True])
def test_adding_to_a_linear_layer_is_an_operator_as_torch_wants_it(attached, entries, grad):
    net, host = attached

    with host.rows(entries):
        checked = torch.library.opcheck(
            add, (*tensors(net, grad=grad), *numbers(host, net.linear))
        )

    assert set(checked.values()) == {"SUCCESS"}


@pytest.mark.parametrize("entries", WHAT)
def test_adding_to_an_embedding_is_an_operator_as_torch_wants_it(attached, entries):
    net, host = attached
    x = torch.arange(ROWS * TOKENS).view(ROWS, TOKENS) % WORDS
    y = net.words.forward(x).requires_grad_()

    with host.rows(entries):
        checked = torch.library.opcheck(add, (x, y, *numbers(host, net.words)))

    assert set(checked.values()) == {"SUCCESS"}


def test_going_back_is_an_operator_as_torch_wants_it(attached):
    net, host = attached
    x, y = tensors(net)

    with host.rows(["one", None, "two"]):
        _, acted = add(x, y, *numbers(host, net.linear))
        checked = torch.library.opcheck(
            add_backward, (torch.ones_like(y), x, acted, *numbers(host, net.linear))
        )

    assert set(checked.values()) == {"SUCCESS"}


@pytest.mark.parametrize("entries", WHAT)
def test_its_gradients_are_those_of_differences(attached, entries):
    net, host = attached

    def added(x, y):
        return add(x, y, *numbers(host, net.linear))[0]

    with host.rows(entries):
        assert torch.autograd.gradcheck(added, tensors(net, grad=True))


@pytest.mark.parametrize("entries", WHAT)
def test_it_adds_what_the_hook_adds(attached, entries):
    net, host = attached
    x, y = tensors(net)

    with host.rows(entries):
        found, _ = add(x, y, *numbers(host, net.linear))
        wanted = net.linear(x)

    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_no_input_is_written_to_and_no_output_is_an_input(attached):
    net, host = attached
    x, y = tensors(net)
    before = x.clone(), y.clone()

    with host.rows(["one", None, "two"]):
        found, _ = add(x, y, *numbers(host, net.linear))

    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])
    assert found.data_ptr() != y.data_ptr()


def test_going_back_follows_what_acted_in_the_forward(attached):
    net, host = attached
    gradients = []
    for others in ([None] * 3, ["two", None, "two"]):
        x, y = tensors(net, grad=True)
        with host.rows(["one", None, "two"]):
            found, _ = add(x, y, *numbers(host, net.linear))
            with host.rows(others):
                found.square().sum().backward()
        gradients.append(x.grad)

    assert torch.equal(*gradients)
    assert gradients[0].any()


def test_going_back_is_refused_when_what_acted_is_gone(attached):
    net, host = attached
    x, y = tensors(net, grad=True)
    with host.rows(["one", None, "two"]):
        found, _ = add(x, y, *numbers(host, net.linear))
    gc.collect()

    with pytest.raises(InputError, match="not used any more"):
        found.sum().backward()


def test_a_host_that_is_gone_adds_nothing():
    x, y = normal(2, INP), normal(2, OUT)

    assert torch.equal(add(x, y, -1, 0)[0], y)


def test_a_cuda_graph_of_torch_compile_leaves_them_out():
    if not hasattr(torch.Tag, "cudagraph_unsafe"):
        pytest.skip("torch before 2.9")

    for operator in (add, add_backward):
        assert torch.Tag.cudagraph_unsafe in operator.tags
