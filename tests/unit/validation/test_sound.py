"""What is called sound is: an exact look would find nothing. What is odd never is."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_hub.formats.factors import Factors, to_source
from lora_hub.formats.matrices import Matrix
from lora_hub.validation import weights
from lora_hub.validation.sound import is_sound

SIZES = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}


def adapter(*pairs, dtype="F32", alpha=4.0):
    """Return an adapter of these factors, q_proj of as many layers."""

    def matrix(values):
        if dtype == "BF16":
            upper = values.astype("<f4").view("<u4") >> 16
            return Matrix("BF16", values.shape, upper.astype("<u2").tobytes())
        return Matrix(dtype, values.shape, values.astype(SIZES[dtype]).tobytes())

    return to_source(
        [
            Factors(f"model.layers.{n}.q_proj", alpha, "alpha/r", matrix(a), matrix(b))
            for n, (a, b) in enumerate(pairs)
        ],
        where="adapter",
    )


def pair(seed, rank=4, inputs=48, outputs=40):
    numbers = np.random.default_rng(seed)
    return (
        numbers.standard_normal((rank, inputs)),
        numbers.standard_normal((outputs, rank)),
    )


def many(count=10, **shape):
    return [pair(seed, **shape) for seed in range(count)]


def asked(source):
    return is_sound(source, weights._kind, weights._limit, weights._MARGIN)


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32", "F64"])
@pytest.mark.parametrize("rank", [1, 2, 8])
def test_random_factors_are_sound(dtype, rank):
    assert asked(adapter(*many(rank=rank), dtype=dtype))


def test_tensors_at_uneven_distances_are_sound():
    assert asked(adapter(*many(3), *many(3, inputs=56), *many(4)))


def with_change(change):
    """Return factors of which those of one target are changed."""
    pairs = many()
    change(*pairs[3])
    return pairs


def zero(a, b):
    b[:] = 0


def not_a_number(a, b):
    a[1, 5] = math.nan


def infinite(a, b):
    b[7, 0] = math.inf


def deficient(a, b):
    b[:, 2] = b[:, 1]


def nearly_deficient(a, b):
    a[2] = a[1] + 1e-9 * a[2]


def outlying(a, b):
    a *= 40


def tiny(a, b):
    a *= 1e-30


def huge(a, b):
    a *= 1e30


def unused_row(a, b):
    a[0] = 0


@pytest.mark.parametrize(
    "change",
    [
        zero,
        not_a_number,
        infinite,
        deficient,
        nearly_deficient,
        outlying,
        tiny,
        huge,
        unused_row,
    ],
)
def test_odd_factors_are_not_sound(change):
    assert not asked(adapter(*with_change(change)))


def test_rank_above_the_sizes_is_not_sound():
    assert not asked(adapter(*many(rank=5, inputs=4)))


def test_scaling_of_zero_is_not_sound():
    assert not asked(adapter(*many(), alpha=0.0))


@settings(max_examples=60, deadline=None)
@given(
    spectra=st.lists(
        st.tuples(st.floats(-9, 3), st.floats(-9, 3)), min_size=10, max_size=10
    ),
    seed=st.integers(0, 999),
    dtype=st.sampled_from(["F16", "BF16", "F32", "F64"]),
)
def test_what_is_sound_has_no_finding_when_looked_at_exactly(spectra, seed, dtype):
    pairs = []
    for index, (low, high) in enumerate(spectra):
        a, b = pair([seed, index])
        a[0] *= 10.0**low  # one direction much weaker or stronger than the others
        b *= 10.0 ** (high / 3)
        pairs.append((a, b))
    source = adapter(*pairs, dtype=dtype)

    if asked(source):
        figures = weights.figures_of(source)
        assert all(one.frobenius for one in figures)
        assert not list(weights._zeros(source, figures))
        assert not list(weights._outliers(source, figures))
        assert not list(weights._ranks(source, figures))
