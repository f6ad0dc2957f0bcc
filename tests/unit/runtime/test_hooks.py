"""Adapters of every kind together: each adds its weight times what it does alone.

The oracle is a copy of the model in float64 whose weights hold `W + Σ wᵢ·changeᵢ`, each
change worked out entry by entry from its definition, against the unmerged base.
"""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lora_hub.adapter.adapter import Adapter, Replaced
from lora_hub.adapter.update import Update
from lora_hub.composing.compose import compose
from lora_hub.errors import ComposeError, FitError
from lora_hub.runtime.host import Host

# beartype, which checks the annotations, draws which items of a list it looks at.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the .random. module inside")

VOCABULARY, SIZE, CHANNELS = 9, 6, 4


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, SIZE, SIZE))

    def forward(self, x):
        return torch.einsum("bti,eoi->bto", x, self.up)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, SIZE)
        self.linear = nn.Linear(SIZE, SIZE)
        self.conv = nn.Conv1d(SIZE, CHANNELS, 3, padding=1)
        self.experts = Experts()
        self.head = nn.Linear(CHANNELS, 5)
        self.double()

    def forward(self, ids):
        x = self.experts(self.linear(self.embedding(ids)).tanh()).tanh()
        return self.head(self.conv(x.mT).mT.tanh())


IDS = torch.arange(14).reshape(2, 7) % VOCABULARY
# target → name of its weight, (out, in) as a matrix, experts in front, fields of the update
TARGETS = {
    "embedding": ((SIZE, VOCABULARY), {"layer": "embedding"}),
    "linear": ((SIZE, SIZE), {}),
    "conv": ((CHANNELS, 3 * SIZE), {"layer": "conv", "kernel": (3,)}),
    "experts.up": ((3, SIZE, SIZE), {"layer": "experts"}),
    "head": ((5, CHANNELS), {}),
}
REPLACED = ("embedding.weight", "linear.weight", "head.weight", "head.bias", "linear.bias")


def matrix(target, weight):
    if target == "embedding":
        return weight.T
    return weight.flatten(1) if target == "conv" else weight


@st.composite
def adapters(draw, kinds=("plain", "dora", "ia3", "columns", "bias"), most_replaced=2):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    updates = {}
    for target in draw(st.sets(st.sampled_from(sorted(TARGETS)))):
        (*front, out, inp), fields = TARGETS[target]
        rank = draw(st.integers(1, 2))
        more = {}
        if target != "experts.up":
            kind = draw(st.sampled_from(kinds))
            if kind == "dora":
                more = {"magnitude": random(out).abs() + 0.5}
            elif kind == "ia3":
                rank, p = 0, random(out)
                more = {"p": p, "bias_scale": p}
            elif kind == "columns":
                more = {"q": random(inp)}
            elif kind == "bias" and target != "embedding":
                more = {"bias": random(out)}
        updates[target] = Update(
            random(*front, rank, inp),
            random(*front, out, rank),
            random(rank),
            **fields,
            **more,
        )
    replaced = {}
    for name in draw(st.sets(st.sampled_from(REPLACED), max_size=most_replaced)):
        shape = Model().get_parameter(name).shape
        rows = draw(st.sampled_from([None, None, (2, 0)])) if len(shape) > 1 else None
        size = shape if rows is None else (2, *shape[1:])
        replaced[name] = Replaced(random(*size), "modules_to_save", rows)
    return Adapter(updates, replaced=replaced)


def alone(adapter):
    """Return name → tensor of the model as this adapter alone, of weight 1, makes it."""
    model = Model()
    changed = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, new in adapter.replaced.items():
        if new.rows is None:
            changed[name] = new.tensor.clone()
        else:
            changed[name][list(new.rows)] = new.tensor
    for target, update in adapter.updates.items():
        name = target if target == "experts.up" else f"{target}.weight"
        weight = matrix(target, changed[name])
        low = (update.b * update.scaling) @ update.a
        new = weight + low
        if update.magnitude is not None:
            new = update.magnitude[:, None] * new / new.pow(2).sum(1, keepdim=True).sqrt()
        if update.p is not None:
            new = new + torch.diag(update.p) @ weight
        if update.q is not None:
            new = new + weight @ torch.diag(update.q)
        own_bias = changed.get(f"{target}.bias")
        changed[name] = (new.T if target == "embedding" else new).reshape(
            changed[name].shape
        )
        if update.bias_scale is not None and own_bias is not None:
            changed[f"{target}.bias"] = own_bias * (1 + update.bias_scale)
        if update.bias is not None:
            changed[f"{target}.bias"] = own_bias + update.bias
    return changed


def together(parts):
    model = Model()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    total = {name: tensor.clone() for name, tensor in base.items()}
    for adapter, weight in parts:
        for name, tensor in alone(adapter).items():
            total[name] += weight * (tensor - base[name])
    model.load_state_dict(total)
    with torch.no_grad():
        return model(IDS)


weights = st.sampled_from([1.0, 0.5, -0.7])


@settings(max_examples=40)
@given(st.lists(st.tuples(adapters(), weights), min_size=1, max_size=3))
def test_every_adapter_adds_its_weight_times_its_whole_change(parts):
    model = Model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    owners = {name: id(parameter) for name, parameter in model.named_parameters()}
    host = Host(model)
    for index, (adapter, _) in enumerate(parts):
        host.load(adapter, as_=str(index))

    host.use({str(index): weight for index, (_, weight) in enumerate(parts)})

    with torch.no_grad():
        found = model(IDS)
    wanted = together(parts)
    assert (found - wanted).abs().max() <= 1e-8 * (1 + wanted.abs().max())
    assert {name: id(each) for name, each in model.named_parameters()} == owners
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())


linear_ones = adapters(("plain", "ia3", "columns", "bias"), most_replaced=0)


@settings(max_examples=30)
@given(st.lists(st.tuples(linear_ones, weights), min_size=1, max_size=3))
def test_composed_they_do_what_they_do_together(parts):
    model = Model()
    host = Host(model)

    host.load(compose(parts), as_="composed")
    host.use("composed")

    with torch.no_grad():
        found = model(IDS)
    wanted = together(parts)
    assert (found - wanted).abs().max() <= 1e-8 * (1 + wanted.abs().max())


def test_detaching_leaves_no_hook_and_the_bits_of_before():
    model = Model()
    before = model(IDS)
    new = Replaced(torch.randn(5, CHANNELS).double(), "modules_to_save")
    host = Host(model)
    host.load(Adapter({}, replaced={"head.weight": new}), as_="mine")

    host.use("mine")
    assert not torch.equal(model(IDS), before)
    host.detach()

    assert torch.equal(model(IDS), before)
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_a_whole_tensor_of_weight_one_is_there_bit_for_bit():
    # Without gradients: torch adds up in another order where one is to be kept.
    model, twin = (Model().requires_grad_(requires_grad=False) for _ in range(2))
    new = Replaced(torch.randn(5, CHANNELS).double(), "modules_to_save")
    with torch.no_grad():
        twin.head.weight.copy_(new.tensor)
    host = Host(model)

    report = host.load(Adapter({}, replaced={"head.weight": new}), as_="mine")
    host.use("mine")

    assert torch.equal(model(IDS), twin(IDS))
    assert str(report).startswith("mine: 1 of 1 targets applied")


def test_a_copy_of_the_model_keeps_what_acted():
    model = Model()
    new = Replaced(torch.randn(5, CHANNELS).double(), "modules_to_save")
    host = Host(model)
    host.load(Adapter({}, replaced={"head.weight": new}), as_="mine")
    host.use("mine")

    twin = copy.deepcopy(model)

    assert torch.equal(twin(IDS), model(IDS))
    host.use(None)
    assert torch.equal(model.head.weight, Model().head.weight)


def test_numbers_that_are_replaced_must_be_finite():
    broken = Replaced(torch.full((5,), torch.inf).double(), "bias")
    host = Host(Model())
    host.load(Adapter({}, replaced={"head.bias": broken}), as_="mine")

    with pytest.raises(ComposeError, match="not finite") as error:
        host.use("mine")

    assert error.value.where == "head.bias"


def test_integers_are_replaced_and_not_weighted():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.tensor([1, 2]))

        def forward(self):
            return self.count + 0

    model = Counting()
    host = Host(model)
    new = Replaced(torch.tensor([3, 4]), "modules_to_save")
    host.load(Adapter({}, replaced={"count": new}), as_="mine")

    host.use("mine")

    assert model().tolist() == [3, 4]
    assert model.count.tolist() == [1, 2]
    with pytest.raises(ComposeError, match="no weighted sum"):
        host.use({"mine": 0.5})


def test_dora_asks_for_a_weight_in_memory():
    update = Update(
        torch.ones(1, SIZE),
        torch.ones(SIZE, 1),
        torch.ones(1).double(),
        magnitude=torch.ones(SIZE).double(),
    )

    with pytest.raises(FitError, match="not in memory") as error:
        Host(Model().to("meta")).load(Adapter({"linear": update}), as_="mine")

    assert error.value.where == "linear"


def test_an_alora_on_other_layers_than_linear_ones_is_refused():
    update = Update(
        torch.ones(1, VOCABULARY),
        torch.ones(SIZE, 1),
        torch.ones(1).double(),
        layer="embedding",
    )

    with pytest.raises(FitError, match="is of kind embedding"):
        Host(Model()).load(Adapter({"embedding": update}, alora_tokens=(1,)), as_="mine")


def tied(role, rows=None, **fields):
    """Return a model whose head is tied, and an adapter that replaces its embedding."""
    model = Model()
    model.head = nn.Linear(SIZE, VOCABULARY, bias=False).double()
    model.head.weight = model.embedding.weight
    size = VOCABULARY if rows is None else len(rows)
    new = Replaced(torch.randn(size, SIZE).double(), role, rows)
    return model, Adapter({}, replaced={"embedding.weight": new}, **fields)


@pytest.mark.parametrize(
    ("role", "rows", "ties_weights", "is_shared"),
    [
        ("modules_to_save", None, False, False),
        ("modules_to_save", None, True, True),
        ("embedding", None, False, True),
        ("token_delta", (1, 2), False, True),
    ],
)
def test_a_tied_tensor_is_replaced_in_one_place_or_in_both_and_it_is_said(
    role, rows, ties_weights, is_shared
):
    model, adapter = tied(role, rows, ties_weights=ties_weights)
    host = Host(model)

    report = host.load(adapter, as_="mine")
    host.use("mine")
    embedding = model.embedding(torch.arange(VOCABULARY))
    head = model.head(torch.eye(SIZE).double()).T

    assert torch.equal(head, embedding) == is_shared
    assert report.notes == (
        "head.weight is replaced with embedding.weight, to which it is tied"
        if is_shared
        else "head.weight shares the tensor embedding.weight and is not replaced",
    )


def test_rows_of_the_head_are_its_own_as_in_peft():
    model, adapter = tied("token_delta", (1, 2), ties_weights=True)
    rows = {"head.weight": adapter.replaced["embedding.weight"]}

    report = Host(model).load(replace(adapter, replaced=rows), as_="mine")

    assert report.notes == (
        "embedding.weight shares the tensor head.weight and is not replaced",
    )


def test_an_update_of_one_of_two_tied_layers_says_that_the_other_stays():
    model, _ = tied("embedding")
    update = Update(
        torch.ones(1, VOCABULARY),
        torch.ones(SIZE, 1),
        torch.ones(1).double(),
        layer="embedding",
    )

    loose = Host(model).load(Adapter({"embedding": update}), as_="mine")
    both = Host(model).load(Adapter({"embedding": update}, ties_weights=True), as_="mine")

    assert loose.notes == ("head shares the weight of embedding and is not changed",)
    assert both.notes == ("head is changed with embedding, to which it is tied",)
