from dataclasses import replace

import msgspec
import pytest
import torch

from lora_hub.adapter.adapter import Adapter, Parent, Replaced
from lora_hub.adapter.update import Update
from lora_hub.composing.compose import compose
from lora_hub.errors import ComposeError
from lora_hub.manifest.document import BaseTarget, BaseVariant
from tests.builders import tiny_manifest


def adapter(*targets, shape=(3, 4), **fields):
    def update():
        return Update(
            torch.randn(2, shape[1]), torch.randn(shape[0], 2), torch.ones(2).double()
        )

    return Adapter({target: update() for target in targets}, **fields)


def base(*modules, root="1", **changes):
    return msgspec.structs.replace(
        tiny_manifest().base,
        root="sha256:" + root * 64,
        targets=tuple(
            BaseTarget(
                module=module, shape=(3, 4), dtype="F32", sha256="sha256:" + "0" * 64
            )
            for module in modules
        ),
        **changes,
    )


def test_targets_are_the_union_in_order_of_names():
    result = compose([(adapter("b", "c"), 1.0), (adapter("a", "b"), 0.5)])

    assert list(result.updates) == ["a", "b", "c"]
    assert result.updates["a"].rank == 2
    assert result.updates["b"].rank == 4


def test_a_target_of_one_part_shares_its_factors():
    one = adapter("a")

    result = compose([(one, 0.5), (adapter("b"), 1.0)])

    assert result.updates["a"].a is one.updates["a"].a
    assert result.updates["a"].scaling.tolist() == [0.5, 0.5]


def test_says_what_it_was_composed_from():
    digest = "sha256:" + "a" * 64

    result = compose([(adapter("a", name="x/one", digest=digest), 0.5), (adapter("a"), -1)])

    assert result.parents == (Parent("x/one", digest, 0.5), Parent(None, None, -1.0))
    assert result.digest is None
    assert result.name is None


def test_hints_are_kept_where_all_agree():
    one = adapter("a", base_name="lab/base", task_type="CAUSAL_LM")
    two = adapter("a", base_name="lab/other", task_type="CAUSAL_LM")

    result = compose([(one, 1.0), (two, 1.0)])

    assert result.base_name is None
    assert result.task_type == "CAUSAL_LM"


def test_the_base_has_the_targets_of_all_and_the_strictest_policy():
    variant = BaseVariant(root="sha256:" + "2" * 64, relation="cast-of", dtype="F16")
    one = adapter("b", base=base("b", policy="struct", variants=(variant,)))
    two = adapter("a", base=base("a", policy="exact"))

    result = compose([(one, 1.0), (two, 1.0), (adapter("c"), 1.0)])

    assert [target.module for target in result.base.targets] == ["a", "b"]
    assert result.base.policy == "exact"
    assert result.base.variants == ()


def test_without_an_identified_base_there_is_none():
    assert compose([(adapter("a"), 1.0)]).base is None


def test_refuses_adapters_of_different_bases_and_names_both():
    one = adapter("a", name="x/one", base=base("a", root="1"))
    two = adapter("a", name="x/two", base=base("a", root="2"))

    with pytest.raises(
        ComposeError, match=r"x/one was made for .*1{64}, x/two for .*2{64}"
    ):
        compose([(one, 1.0), (two, 1.0)])


def test_refuses_shapes_that_disagree_and_names_both():
    with pytest.raises(ComposeError) as error:
        compose([(adapter("a", name="x/one"), 1.0), (adapter("a", shape=(3, 5)), 1.0)])

    assert error.value.where == "a"
    assert error.value.problem == (
        "x/one changes a weight of shape [3, 4], adapter 2 one of shape [3, 5]"
    )


@pytest.mark.parametrize(
    ("parts", "method", "message"),
    [
        ([], "linear", "nothing to compose"),
        ([(adapter("a"), float("nan"))], "linear", "the weight is nan"),
        ([(adapter("a"), float("inf"))], "cat", "the weight is inf"),
        ([(adapter("a"), 1.0)], "tias", "'tias' is no method"),
        ([(adapter("a"), 1e308)] * 4, "linear", "float64 cannot hold"),
    ],
)
def test_refuses_what_cannot_be_composed(parts, method, message):
    with pytest.raises(ComposeError, match=message):
        compose(parts, method)


def test_an_unknown_method_is_answered_with_those_there_are():
    with pytest.raises(ComposeError) as error:
        compose([(adapter("a"), 1.0)], "ties")

    assert error.value.hint == "methods: linear, cat"


def update(rank=2, out=3, inp=4, **fields):
    return Update(
        torch.randn(rank, inp), torch.randn(out, rank), torch.ones(rank).double(), **fields
    )


def dora(name=None):
    return Adapter({"a": update(magnitude=torch.ones(3).double())}, name=name)


@pytest.mark.parametrize("method", ["linear", "cat"])
def test_dora_alone_with_weight_one_passes_unchanged(method):
    one = dora()

    result = compose([(one, 1.0), (adapter("b"), 0.5)], method)

    assert result.updates["a"].magnitude is one.updates["a"].magnitude
    assert result.updates["a"].a is one.updates["a"].a


@pytest.mark.parametrize(
    "parts",
    [
        [(dora("x/dora"), 0.5)],
        [(dora("x/dora"), 1.0), (adapter("a"), 1.0)],
        [(adapter("a"), 1.0), (dora("x/dora"), 1.0)],
    ],
)
def test_refuses_a_sum_with_dora_by_name(parts):
    with pytest.raises(ComposeError) as error:
        compose(parts)

    assert error.value.where == "a"
    assert error.value.problem == (
        "x/dora is a DoRA adapter, whose weighted sum needs the base's weight"
    )
    assert "attach the adapters together" in error.value.hint


@pytest.mark.parametrize(
    ("one", "other", "found"),
    [
        (
            update(layer="embedding"),
            update(),
            "a layer of kind embedding, adapter 2 one of kind linear",
        ),
        (
            update(inp=12, layer="conv", kernel=(3,)),
            update(inp=12, layer="conv", kernel=(1, 3)),
            "a kernel of [3], adapter 2 one of [1, 3]",
        ),
        (
            update(out=4, inp=12, layer="conv", kernel=(3,), groups=2),
            update(out=4, inp=12, layer="conv", kernel=(3,)),
            "a convolution of 2 groups, adapter 2 one of 1",
        ),
        (
            update(),
            update(rank=0, out=5, inp=0, p=torch.ones(5).double()),
            "a weight of shape [3, 4], adapter 2 one of shape [5, 0]",
        ),
    ],
)
def test_refuses_updates_of_other_layers(one, other, found):
    with pytest.raises(ComposeError) as error:
        compose([(Adapter({"a": one}), 1.0), (Adapter({"a": other}), 1.0)])

    assert error.value.problem == f"adapter 1 changes {found}"


def test_factors_on_outputs_and_on_inputs_know_the_shape_together():
    rows = update(rank=0, inp=0, p=torch.ones(3).double())
    columns = update(rank=0, out=0, q=torch.ones(4).double())

    result = compose([(Adapter({"a": rows}), 0.5), (Adapter({"a": columns}), 2.0)])

    found = result.updates["a"]
    assert found.shape == (3, 4)
    assert (found.p.tolist(), found.q.tolist()) == ([0.5] * 3, [2.0] * 4)


def test_channels_of_a_convolution_become_columns_beside_factors():
    factors = update(inp=6, layer="conv", kernel=(3,))
    channels = update(rank=0, out=0, inp=2, q=torch.tensor([1.0, 2.0]).double())
    channels = replace(channels, layer="conv")

    result = compose([(Adapter({"a": factors}), 1.0), (Adapter({"a": channels}), 1.0)])

    assert result.updates["a"].q.tolist() == [1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("method", ["linear", "cat"])
def test_the_rows_of_a_group_stay_side_by_side(method):
    def grouped(rank):
        b = torch.zeros(4, rank)
        b[:2, : rank // 2], b[2:, rank // 2 :] = 1, 2
        return replace(update(rank, 4, 12, layer="conv", kernel=(3,), groups=2), b=b)

    one, other = grouped(2), grouped(4)

    found = compose([(Adapter({"a": one}), 1.0), (Adapter({"a": other}), 1.0)], method)

    total = found.updates["a"]
    assert total.b.tolist() == [[1, 1, 1, 0, 0, 0]] * 2 + [[0, 0, 0, 2, 2, 2]] * 2
    wanted = one.b @ one.a + other.b @ other.a
    assert torch.allclose(total.b @ total.a, wanted, atol=1e-5)


def replacing(seed=0, rows=None, **fields):
    torch.manual_seed(seed)
    new = Replaced(torch.randn(2, 4), "modules_to_save", rows)
    return Adapter({"a": update()}, replaced={"head.weight": new}, **fields)


@pytest.mark.parametrize(
    "parts",
    [
        [(replacing(), 1.0), (adapter("a"), 0.5)],
        [(replacing(), 0.25), (replacing(), 0.75)],
    ],
)
def test_a_replaced_tensor_is_taken_over_where_the_base_has_no_say(parts):
    result = compose(parts)

    assert torch.equal(result.replaced["head.weight"].tensor, torch.as_tensor(NEW))


NEW = replacing().replaced["head.weight"].tensor.tolist()


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        ([(replacing(), 0.5)], "of weight 0.5"),
        ([(replacing(), 1.0), (replacing(), 1.0)], "of several adapters"),
        ([(replacing(), 0.5), (replacing(1), 0.5)], "of several adapters"),
        ([(replacing(), 0.5), (replacing(rows=(0, 1)), 0.5)], "of several adapters"),
    ],
)
def test_refuses_sums_of_replaced_tensors_that_need_the_base(parts, told):
    with pytest.raises(ComposeError) as error:
        compose(parts)

    assert error.value.where == "head.weight"
    assert error.value.problem == (
        f"the sum of a replaced tensor {told} and the base's own depends on the base"
    )


def test_refuses_a_weight_that_one_replaces_and_another_scales():
    scaling = Adapter({"head": update(2, 2, 4, p=torch.ones(2).double())})

    with pytest.raises(ComposeError, match="another one scales the weight it had"):
        compose([(replacing(), 1.0), (scaling, 1.0)])


def test_invocation_tokens_are_those_of_all_parts():
    one, other = (adapter("a", alora_tokens=(5, 6)) for _ in range(2))

    assert compose([(one, 1.0), (other, 0.5)]).alora_tokens == (5, 6)
    with pytest.raises(ComposeError) as error:
        compose([(one, 1.0), (adapter("a"), 1.0)])
    assert error.value.problem == (
        "adapter 1 acts from its invocation tokens [5, 6] on, adapter 2 on every token"
    )


def test_ties_must_agree_where_they_matter():
    def embedding(**fields):
        return Adapter({"e": update(layer="embedding")}, **fields)

    tied = embedding(ties_weights=True)

    assert compose([(tied, 1.0), (adapter("a"), 1.0)]).ties_weights
    with pytest.raises(ComposeError, match="with the input embedding, adapter 2 does not"):
        compose([(tied, 1.0), (embedding(), 1.0)])


def test_a_replaced_bias_and_another_ones_scaling_of_it_are_refused():
    new = {"a.bias": Replaced(torch.ones(3), "bias")}
    scaled = replace(adapter("a").updates["a"], bias_scale=torch.ones(3).double())
    scaling = Adapter({"a": scaled})
    both = Adapter({"a": scaled}, replaced=new)

    with pytest.raises(
        ComposeError, match="replaces the bias, another one scales"
    ) as error:
        compose([(adapter("a", replaced=new), 1.0), (scaling, 0.5)])

    assert error.value.where == "a.bias"
    assert compose([(both, 1.0), (adapter("b"), 0.5)]).replaced == new


def test_an_update_that_may_be_of_the_tied_head_is_not_lost_in_a_sum():
    embedding = Update(
        torch.randn(2, 9), torch.randn(4, 2), torch.ones(2).double(), layer="embedding"
    )
    tied = Adapter({"embed": embedding}, ties_weights=True, name="tied")

    with pytest.raises(ComposeError, match="tied changes the output embedding"):
        compose([(tied, 1.0), (adapter("head", shape=(9, 4)), 1.0)])

    other = adapter("other", shape=(4, 9))
    assert compose([(tied, 1.0), (other, 1.0)]).ties_weights
