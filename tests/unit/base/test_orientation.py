"""Shapes of factors and of stored weights tell the same layer, both ways."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_hub.base.orientation import matrix_shape, stores_transposed, weight_shape

SIZE = st.integers(1, 9)


@given(out=SIZE, inp=SIZE, rank=SIZE, is_transposed=st.booleans())
def test_factors_of_a_matrix_tell_how_it_is_stored(out, inp, rank, is_transposed):
    stored = weight_shape(
        "linear", rank, (rank, inp), (out, rank), is_transposed=is_transposed
    )

    assert stored == ((inp, out) if is_transposed else (out, inp))
    assert matrix_shape("linear", stored, is_transposed=is_transposed) == (out, inp)


@given(out=SIZE, inp=SIZE, rank=SIZE, experts=SIZE, is_transposed=st.booleans())
def test_factors_of_experts_tell_how_many(out, inp, rank, experts, is_transposed):
    a, b = (experts * rank, inp), (out, rank * experts)

    stored = weight_shape("experts", rank, a, b, is_transposed=is_transposed)

    assert stored == (experts, *((inp, out) if is_transposed else (out, inp)))
    assert matrix_shape("experts", stored, is_transposed=is_transposed) == (
        experts,
        out,
        inp,
    )


@given(
    out=SIZE,
    inp=SIZE,
    rank=SIZE,
    groups=SIZE,
    kernel=st.lists(SIZE, min_size=1, max_size=3).map(tuple),
)
def test_factors_of_a_convolution_tell_its_groups(out, inp, rank, groups, kernel):
    a = (rank * groups, inp * groups, *kernel)
    b = (out * groups, rank, *(1 for _ in kernel))

    stored = weight_shape("conv", rank * groups, a, b, is_transposed=False)

    assert stored == (out * groups, inp, *kernel)


@pytest.mark.parametrize(
    ("layer", "rank", "a", "b"),
    [
        ("linear", 2, (2, 4), (4, 3)),
        ("linear", 0, (0, 4), (4, 0)),
        ("linear", 2, (2, 4, 1), (4, 2)),
        ("embedding", 3, (2, 4), (4, 2)),
        ("experts", 2, (5, 4), (4, 5)),
        ("experts", 2, (4, 4), (4, 6)),
        ("experts", 2, (0, 4), (4, 0)),
        ("conv", 2, (2, 4), (4, 2)),
        ("conv", 2, (2, 4, 3), (4, 2, 1, 1)),
        ("conv", 2, (2, 4, 3), (4, 2, 3)),
        ("conv", 2, (2, 4, 3), (4, 0, 1)),
        ("conv", 3, (3, 4, 3), (4, 2, 1)),
        ("conv", 4, (4, 3, 3), (4, 2, 1)),
        ("conv", 4, (4, 4, 3), (3, 2, 1)),
        ("conv", 2, (2, 4, 3, 3, 3, 3), (4, 2, 1, 1, 1, 1)),
    ],
)
def test_factors_that_contradict_each_other_make_no_weight(layer, rank, a, b):
    assert weight_shape(layer, rank, a, b, is_transposed=False) is None


def test_shapes_that_a_layer_cannot_have_come_back_as_they_are():
    assert matrix_shape("linear", (4,), is_transposed=True) == (4,)
    assert matrix_shape("linear", (), is_transposed=True) == ()
    assert matrix_shape("conv", (4, 2), is_transposed=False) == (4, 2)
    assert matrix_shape("conv", (8, 2, 3, 5), is_transposed=False) == (8, 30)


def test_only_some_models_store_the_transpose():
    assert stores_transposed("linear", "transformer.h.0.attn.c_attn", "gpt2")
    assert not stores_transposed("linear", "model.layers.0.q_proj", "gpt2")
    assert not stores_transposed("linear", "transformer.h.0.attn.c_attn", "llama")
    assert not stores_transposed("conv", "h.c_proj", "gpt2")
    assert stores_transposed("experts", "layers.0.mlp.experts.down_proj", "gpt_oss")
    assert not stores_transposed("experts", "layers.0.mlp.experts.down_proj", None)
    assert stores_transposed("embedding", "model.embed_tokens", None)
