import msgspec
import pytest
import torch

from lora_hub.adapter.adapter import Adapter, Parent
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
