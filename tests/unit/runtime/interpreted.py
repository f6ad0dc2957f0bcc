"""A host whose products Triton's interpreter computes; `test_product.py` runs this file.

The oracle is the same model with a host that leaves all products to torch, which other
tests compare with float64.
"""

import os

assert os.environ.get("TRITON_INTERPRET") == "1", "run test_product.py"

import gc
import random

import pytest
import torch
from torch import nn

import lora_hub
from lora_hub.adapter.adapter import Adapter
from lora_hub.adapter.update import Update
from lora_hub.errors import InputError
from tests.builders import tiny_model

TOKENS = torch.arange(6).reshape(3, 2) * 5 % 32
SITES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def linear(model, leaves=SITES):
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in leaves
    }


def adapter(model, rank, seed, leaves=SITES, dtype=torch.float32, **fields):
    """Return a random adapter; `fields` gives of some targets' vectors the sizes."""
    made = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return (torch.randn(shape, generator=made) * 0.3).to(dtype)

    scaling = torch.full((rank,), 0.7, dtype=torch.float64)
    return Adapter(
        {
            target: Update(
                normal(rank, layer.in_features),
                normal(layer.out_features, rank),
                scaling,
                **{name: normal(layer.out_features).double() for name in fields},
            )
            for target, layer in linear(model, leaves).items()
        },
        name=str(seed),
    )


ADAPTERS = {
    "a": (3, 1, SITES),
    "b": (17, 2, ("q_proj", "v_proj", "down_proj")),
    "c": (5, 3, ("k_proj", "up_proj")),
}


def pair(dtype="float32", **options):
    """Return two hosts on equal models: the kernels', and torch's as the oracle."""
    made = []
    for kernels in ("triton", "torch"):
        model = tiny_model(dtype=dtype, layers=1).requires_grad_(requires_grad=False)
        host = lora_hub.attach(model, kernels=kernels, **options)
        for name, (rank, seed, leaves) in ADAPTERS.items():
            host.load(adapter(model, rank, seed, leaves), as_=name)
        made.append((model, host))
    return made


def answers(model, tokens=TOKENS):
    with torch.no_grad():
        return model(tokens).logits


def same(found, wanted):
    """Two ways to sum in float32; the logits are of size 1."""
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-5)


def is_the_kernels(host):
    return any(len(table._held) for table in host._graphs._slots.tables)


@pytest.mark.parametrize(
    "entries",
    [
        ["a", None, "b"],
        ["c", {"a": 0.5, "b": -2.0}, {"b": 1.0}],
        [{"a": 0.1, "b": 0.2, "c": 0.3}, "a", {"a": 3.0}],
        [None, None, "c"],
    ],
)
def test_rows_are_what_torch_makes_of_them(entries):
    (model, host), (plain, oracle) = pair()

    with host.rows(entries):
        found = answers(model)
    with oracle.rows(entries):
        wanted = answers(plain)

    same(found, wanted)
    bare = [row for row, entry in enumerate(entries) if entry is None]
    assert torch.equal(found[bare], answers(plain)[bare])
    assert is_the_kernels(host)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_in_half_precision_a_layer_is_rounded_once(dtype):
    (model, host), (plain, oracle) = pair(dtype=dtype)
    entries = ["a", "b", {"a": 0.5, "c": 0.5}]

    with host.rows(entries):
        found = answers(model)
    with oracle.rows(entries):
        wanted = answers(plain)

    # Roundings of two layers, of which either way takes some another way.
    eps = torch.finfo(found.dtype).eps
    assert (found - wanted).abs().max() <= 8 * eps * wanted.abs().max()
    assert is_the_kernels(host)


def test_use_and_using_and_none_are_what_torch_makes_of_them():
    (model, host), (plain, oracle) = pair()
    bare = answers(plain)

    for what in ("a", {"b": 0.3}, None, {"a": 1.0, "c": -0.5}):
        host.use(what)
        oracle.use(what)
        same(answers(model), answers(plain))
        with host.using("b"), oracle.using("b"):
            same(answers(model), answers(plain))
    host.use(None)

    assert torch.equal(answers(model), bare)


@pytest.mark.slow
def test_many_tokens_and_one_and_flat_rows_agree():
    (model, host), (plain, oracle) = pair()

    for length in (1, 2, 33):
        tokens = torch.arange(3 * length).reshape(3, length) % 32
        with host.rows(["a", "b", None]), oracle.rows(["a", "b", None]):
            same(answers(model, tokens), answers(plain, tokens))


def test_a_row_in_inference_mode_is_what_it_is_without():
    (model, host), _ = pair()

    with host.rows(["a", "b", None]):
        wanted = answers(model)
        with torch.inference_mode():
            found = model(TOKENS).logits

    same(found, wanted)


def test_gradients_go_torchs_way():
    (model, host), (plain, oracle) = pair()
    gradients = []
    for each, its in ((model, host), (plain, oracle)):
        words = each.get_input_embeddings()(TOKENS).requires_grad_()
        with its.rows(["a", "b", None]):
            each(inputs_embeds=words).logits.square().sum().backward()
        gradients.append(words.grad)

    same(*gradients)


@pytest.mark.slow
def test_a_swap_of_other_rank_and_targets_acts_at_once():
    (model, host), (plain, oracle) = pair()
    drawn = random.Random(0)

    with host.rows(["a", "b", None]), oracle.rows(["a", "b", None]):
        for turn in range(4):
            leaves = drawn.sample(SITES, drawn.randint(1, 7))
            new = adapter(model, drawn.randint(1, 40), 10 + turn, leaves)
            host.swap("a", new)
            oracle.swap("a", new)
            same(answers(model), answers(plain))


@pytest.mark.slow
def test_an_adapter_that_left_and_came_back_is_read_where_it_is_now():
    model = tiny_model(layers=1)
    one = sum(
        3 * 4 * (each.in_features + each.out_features) for each in linear(model).values()
    )
    (model, host), (plain, oracle) = pair(budget=5 * one)
    held = []
    for turn in range(4):
        name = f"n{turn}"
        new = adapter(model, 3, 20 + turn)
        host.load(new, as_=name)
        oracle.load(new, as_=name)
        for other in (name, f"n{turn // 2}"):
            with host.rows([other, "b", None]), oracle.rows([other, "b", None]):
                same(answers(model), answers(plain))
        gc.collect()
        held.append(max(table.slots for table in host._graphs._slots.tables))
        # What has left is held by no table.
        assert len(host._graphs._slots._of) <= 5  # of seven
    assert host.memory.used_bytes <= 5 * one
    assert set(held) == {64}


def test_what_is_no_plain_product_goes_torchs_way_at_its_layers():
    (model, host), (plain, oracle) = pair()
    more = adapter(model, 4, 50, ("q_proj", "up_proj"), p=True, bias=True)
    mixed = Adapter({**adapter(model, 2, 51).updates, **more.updates}, name="mixed")
    for each in (host, oracle):
        each.load(mixed)

    with host.rows(["mixed", "a", None]), oracle.rows(["mixed", "a", None]):
        same(answers(model), answers(plain))


def test_an_input_that_was_written_to_is_another_one():
    class Written(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(16, 8) for _ in range(3))

        def forward(self, x):
            x = x.clone()
            q = self.q_proj(x)
            x += 1
            return torch.cat([q, self.k_proj(x), self.v_proj(x)], -1)

    torch.manual_seed(0)
    model = Written().requires_grad_(requires_grad=False)
    new = adapter(model, 4, 1, ("q_proj", "k_proj", "v_proj"))
    x = torch.randn(2, 16)
    found = []
    for kernels in ("triton", "torch"):
        host = lora_hub.attach(model, kernels=kernels)
        host.load(new, as_="one")
        with host.rows(["one", None]), torch.no_grad():
            found.append(model(x))
        host.detach()

    same(*found)


def static(host):
    return next(iter(host._graphs._static.values()))


class Recorded:
    """What a captured graph would do again: the model's kernels on the host's own lists.

    Interpreted kernels cannot be captured, so the forward runs again with the route that
    was captured; its effects read nothing else than what a graph reads.
    """

    def __init__(self, model, host):
        self.model, self.host = model, host
        self.route = host._in_force.now.route

    def replay(self, tokens=TOKENS):
        hooks = self.host._hooks
        hooks.put_on(self.route.effects)
        asked, hooks._now = hooks._now, lambda: self.route
        try:
            return answers(self.model, tokens)
        finally:
            hooks._now = asked


def addresses(host):
    lists = [each for rows in static(host).on.values() for each in (rows.first, rows.slot)]
    return [each.data_ptr() for each in (*lists, host._graphs._slots.tables[0].cells)]


def test_a_graph_does_what_comes_into_force_later():
    (model, host), (plain, oracle) = pair()
    with host.rows(["a", "b", None]), host.capturing():
        graph = Recorded(model, host)
        first = graph.replay()
    with oracle.rows(["a", "b", None]):
        same(first, answers(plain))
    before = addresses(host)
    drawn = random.Random(1)

    same(graph.replay(), answers(plain))  # nothing is in force
    for turn in range(3):
        entries = [
            drawn.choice(["a", "b", "c", None, {"a": 0.5, "b": 2.0}]) for _ in range(3)
        ]
        leaves = drawn.sample(SITES, drawn.randint(1, 7))
        new = adapter(model, drawn.randint(1, 64), 60 + turn, leaves)
        with host.rows(entries), oracle.rows(entries):
            same(graph.replay(), answers(plain))
            for each in (host, oracle):
                each.swap("a", new)
            same(graph.replay(), answers(plain))
    for each in (host, oracle):
        each.use({"c": 0.5, "a": 1.0})
    same(graph.replay(), answers(plain))
    with host.using("b"), oracle.using("b"):
        same(graph.replay(), answers(plain))
    for each in (host, oracle):
        each.use(None)
    same(graph.replay(), answers(plain))

    assert addresses(host) == before


def test_a_graph_for_all_rows_does_what_is_used_later():
    (model, host), (plain, oracle) = pair()
    with host.capturing():  # nothing is in force
        graph = Recorded(model, host)
        same(graph.replay(), answers(plain))

    for what in ("a", {"a": 0.5, "b": -1.0}, None, "c"):
        for each in (host, oracle):
            each.use(what)
        same(graph.replay(), answers(plain))
        with host.rows(["b", None, None]):  # speaks to graphs of three rows alone
            same(graph.replay(), answers(plain))


@pytest.mark.slow
def test_graphs_of_several_numbers_of_rows_hear_what_is_said_to_them():
    (model, host), (plain, oracle) = pair()
    two = TOKENS[:2]
    with host.rows(["a"] * 3), host.capturing():
        of_three = Recorded(model, host)
    with host.rows([None] * 2), host.capturing():
        of_two = Recorded(model, host)

    host.use("c")
    oracle.use("c")
    with host.rows(["a", None, "b"]), host.rows(["b", "a"]):
        with oracle.rows(["a", None, "b"]):
            same(of_three.replay(), answers(plain))
        with oracle.rows(["b", "a"]):
            same(of_two.replay(two), answers(plain, two))
    same(of_three.replay(), answers(plain))
    same(of_two.replay(two), answers(plain, two))


def test_after_detaching_a_graph_goes_on_with_the_base_alone():
    (model, host), (plain, _) = pair()
    with host.rows(["a", "b", None]), host.capturing():
        lists = static(host).on[torch.device("cpu")]

    host.use("a")
    assert lists.most_slot >= 0
    host.detach()

    assert lists.most_slot == -1
    assert not torch.count_nonzero(lists.last)
    same(answers(model), answers(plain))


@pytest.mark.slow
def test_slots_of_what_is_not_in_force_are_given_to_others_when_a_graph_has_no_more():
    (model, host), (plain, oracle) = pair()
    with host.rows(["a", "b", None]), host.capturing():
        graph = Recorded(model, host)
    before = addresses(host)
    for turn in range(70):
        new = adapter(model, 2, 100 + turn, ("q_proj",))
        for each in (host, oracle):
            each.load(new, as_=f"n{turn}")
        with host.rows([f"n{turn}", "b", None]):
            pass

    for name in ("n69", "n0", "a"):
        with host.rows([name, "b", "n69"]), oracle.rows([name, "b", "n69"]):
            same(graph.replay(), answers(plain))
            same(answers(model), answers(plain))
    assert addresses(host) == before


def refused(host, entries):
    with pytest.raises(InputError) as caught, host.rows(entries):
        pass
    return str(caught.value)


def test_what_a_graph_cannot_do_is_refused_by_name_and_changes_nothing():
    (model, host), (plain, oracle) = pair()
    host.load(adapter(model, 4, 50, ("q_proj",), p=True), as_="scaled")
    host.load(adapter(model, 4, 51, ("q_proj",), bias=True), as_="biased")
    host.load(adapter(model, 65, 52, ("q_proj",)), as_="large")
    host.load(adapter(model, 4, 53, ("lm_head",)), as_="head")
    five = {f"n{turn}": 1.0 for turn in range(5)}
    for turn, name in enumerate(five):
        host.load(adapter(model, 1, 90 + turn, ("q_proj",)), as_=name)
    host.use("a")
    with (
        host.rows(["a", "b", None]),
        host.capturing(reserve=SITES, per_row=4, max_rank=64),
    ):
        graph = Recorded(model, host)

    said = refused(host, ["scaled", None, None])
    assert "more than to add a product" in said
    assert "scaled" in said
    assert "q_proj" in said
    assert "more than to add a product" in refused(host, ["biased", None, None])
    assert "rank 65" in refused(host, ["large", None, None])
    assert "lm_head, which has no kernels" in refused(host, ["head", None, None])
    assert "5 adapters act on one row" in refused(host, [five, None, None])
    with pytest.raises(InputError, match="more than to add"):
        host.use("scaled")
    with pytest.raises(InputError, match="more than to add"):
        host.swap("a", adapter(model, 4, 54, ("q_proj",), p=True))
    with (
        host.rows([None] * 3),
        pytest.raises(InputError, match="room for 4"),
        host.capturing(per_row=8),
    ):
        pass

    oracle.use("a")
    same(graph.replay(), answers(plain))
    same(answers(model), answers(plain))
    two = TOKENS[:2]  # of which no graph was captured
    oracle.load(adapter(plain, 65, 52, ("q_proj",)), as_="large")
    with host.rows(["large", None]), oracle.rows(["large", None]):
        same(answers(model, two), answers(plain, two))


def test_a_layer_whose_rows_are_not_known_is_refused_in_a_graph_too():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(16, 16)

        def forward(self, x):
            return self.first(x.repeat(2, 1, 1))

    model = Mixed().requires_grad_(requires_grad=False)
    host = lora_hub.attach(model, kernels="triton")

    with (
        host.rows([None, None]),
        host.capturing(),
        pytest.raises(InputError, match="which of them these are is not known"),
        torch.no_grad(),
    ):
        model(torch.randn(2, 3, 16))


def test_gradients_are_refused_in_a_graph():
    (model, host), _ = pair()
    words = model.get_input_embeddings()(TOKENS).requires_grad_()

    with (
        host.rows(["a", "b", None]),
        host.capturing(),
        pytest.raises(InputError, match="wants gradients"),
    ):
        model(inputs_embeds=words)
