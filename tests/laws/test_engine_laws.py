"""What an engine computes of what is written for it is what the adapter is.

The oracle multiplies with exact fractions: it shares neither numbers nor code with what
folds, pads and rounds.
"""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lora_hub.errors import LossyConversion
from lora_hub.formats import factors
from lora_hub.formats.engines.fit import check, fit
from lora_hub.formats.engines.table import ENGINES
from lora_hub.formats.factors import Factors
from lora_hub.formats.fold import is_power_of_two, times
from lora_hub.formats.matrices import Matrix
from tests.adapters import LANGUAGE, numbers, part, source

ALPHAS = st.one_of(
    st.sampled_from([0.0, 1.0, 4.0, 16.0, -8.0, 0.1]),
    st.floats(-1e3, 1e3).filter(lambda alpha: abs(alpha) > 1e-3),
)

# The bits of a number with its leading one, and the smallest number that has them all.
DIGITS = {"BF16": (8, -126), "F16": (11, -14), "F32": (24, -126), "F64": (53, -1022)}


@st.composite
def parts(draw, dtypes=("F16", "BF16", "F32", "F64")):
    chosen = draw(st.lists(st.sampled_from(LANGUAGE), min_size=1, unique=True))
    rule = draw(st.sampled_from(["alpha/r", "alpha/sqrt(r)"]))
    dtype = draw(st.sampled_from(dtypes))
    return [
        part(
            target,
            rank=draw(st.integers(1, 5)),
            alpha=draw(ALPHAS),
            rule=rule,
            dtype=dtype,
            seed=draw(st.integers(0, 9)),
        )
        for target in chosen
    ]


def exact(part: Factors):
    """Return the factors as arrays of fractions, `b` times the scaling."""
    fractions = np.vectorize(Fraction, otypes=[object])
    a, b = (each.values().astype(float) for each in (part.a, part.b))
    return fractions(a), fractions(b) * Fraction(part.scaling)


@pytest.mark.parametrize("engine", ["vllm", "llama.cpp"])
@settings(max_examples=30, deadline=None)
@given(made=parts())
def test_delta_is_the_same_within_the_error_that_is_told(engine, made):
    before = source(*made)

    try:
        after = fit(before, ENGINES[engine])
    except LossyConversion:
        assume(False)

    check(before, after.source, after.error)
    found = {part.target: part for part in factors.of_source(after.source)}
    for one in factors.of_source(before):
        (a, b), (a2, b2) = exact(one), exact(found[one.target])
        digits, smallest = DIGITS[one.b.dtype]
        tiny = Fraction(2) ** smallest * abs(Fraction(found[one.target].scaling))
        bound = Fraction(after.error) + Fraction(1, 2**51)
        assert (a2[: one.rank] == a).all()
        assert not b2[:, one.rank :].any()
        assert (abs(b2[:, : one.rank] - b) <= bound * np.maximum(abs(b), tiny)).all()
        assert after.error <= Fraction(1, 2**digits) + Fraction(1, 2**51)


@settings(max_examples=30, deadline=None)
@given(made=parts())
def test_one_alpha_and_one_rank_are_left(made):
    try:
        after = fit(source(*made), ENGINES["vllm"]).source
    except LossyConversion:
        assume(False)

    assert len({(update.rank, update.alpha, update.rule) for update in after.updates}) == 1


@settings(max_examples=30, deadline=None)
@given(made=parts(), alpha=ALPHAS)
def test_uniform_scalings_keep_every_bit(made, alpha):
    same = [
        part(one.target, rank=3, alpha=alpha, rule=one.rule, dtype=one.a.dtype)
        for one in made
    ]
    before = source(*same)

    after = fit(before, ENGINES["vllm"])

    for one, two in zip(
        factors.of_source(before), factors.of_source(after.source), strict=True
    ):
        assert bytes(one.a.data) == bytes(two.a.data)
        assert bytes(one.b.data) == bytes(two.b.data)
        assert two.scaling == pytest.approx(one.scaling, rel=2.0**-52, abs=0)
    assert after.error <= 2.0**-53


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(["BF16", "F16", "F32", "F64"]),
    seed=st.integers(0, 99),
    ratio=st.fractions(-50, 50, max_denominator=97),
)
def test_product_is_the_nearest_number_of_the_dtype(dtype, seed, ratio):
    data = numbers(np.random.default_rng(seed), 12, dtype)
    matrix = Matrix(dtype, (3, 4), data)

    found = times(matrix, ratio)

    assert found is not None
    product, error = found
    digits, smallest = DIGITS[dtype]
    for was, now in zip(matrix.values().flat, product.values().flat, strict=True):
        wanted = Fraction(float(was)) * ratio
        size = max(abs(wanted), Fraction(2) ** smallest)
        # Half a unit in the last place, and what rounding in float64 first may add.
        assert abs(Fraction(float(now)) - wanted) <= size * (
            Fraction(1, 2**digits) + Fraction(1, 2**51)
        )
        assert abs(Fraction(float(now)) - wanted) <= size * (
            Fraction(error) + Fraction(1, 2**52)
        )
    if is_power_of_two(ratio):
        assert error == 0.0 or dtype == "F16"
