"""What holds between any two dialects: what comes back is what went in, bit for bit.

An adapter that both dialects can say goes through the first, then through the second.
Which those are, the table in the code says; what it says no to is shown to be refused.
"""

import contextlib
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_hub.errors import LoraHubError, LossyConversion
from lora_hub.formats import factors
from lora_hub.formats.detect import DIALECTS
from lora_hub.formats.dialect import FEATURES
from lora_hub.scaling import alpha_of, scaling, spell
from tests import adapters
from tests.adapters import K0, LANGUAGE, PIPELINE, Q0, TO_OUT, TO_Q

RULES = st.sampled_from(["alpha/r", "alpha/sqrt(r)"])
ALPHAS = st.one_of(
    st.sampled_from([0.5, 1.0, 2.0, 8.0, 16.0, 32.0]),
    st.floats(2**-10, 2**10, width=32),
)
PAIRS = list(itertools.product(DIALECTS, repeat=2))


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {
        "language": adapters.language_base(folder / "language"),
        "components": adapters.pipeline_base(folder / "pipeline"),
    }


@st.composite
def adapter_parts(draw, says):
    """Draw factors that a dialect saying these features can say, and the kind of names."""
    kinds = sorted(says & {"language", "components"})
    kind = draw(st.sampled_from(kinds))
    targets = draw(
        st.lists(
            st.sampled_from(LANGUAGE if kind == "language" else PIPELINE),
            min_size=1,
            unique=True,
        )
    )
    dtypes = ["F32", "F16", "BF16"] + (["F64"] if "float64" in says else [])
    dtype = draw(st.sampled_from(dtypes))
    rule = draw(RULES) if "rslora" in says else "alpha/r"
    ranks, alphas = st.integers(1, 9), ALPHAS
    if "alpha64" in says:
        alphas |= st.floats(1e-3, 1e3)
    rank, alpha = draw(ranks), draw(alphas)
    parts = []
    for target in targets:
        if "ranks" in says and "scalings" in says:
            rank = draw(ranks)
        if "scalings" in says:
            alpha = draw(alphas)
        parts.append(adapters.part(target, rank=rank, alpha=alpha, rule=rule, dtype=dtype))
    return kind, parts


@pytest.mark.parametrize(
    ("one", "two"),
    [
        pair
        for pair in PAIRS
        if DIALECTS[pair[0]].says & DIALECTS[pair[1]].says & {"language", "components"}
    ],
)
def test_through_two_dialects_and_back_is_the_identity(one, two, bases):
    says = DIALECTS[one].says & DIALECTS[two].says

    @settings(max_examples=25, deadline=None)
    @given(adapter_parts(says))
    def holds(drawn):
        kind, parts = drawn
        base, alpha = bases[kind], adapters_alpha(parts)
        first = adapters.source(*parts)

        second = through(one, first, base, alpha)
        third = through(two, second, base, alpha)

        assert adapters.content(second) == adapters.content(first)
        assert adapters.content(third) == adapters.content(first)

    holds()


def through(dialect, adapter, base, alpha):
    files = adapters.written(dialect, adapter, base)
    return adapters.read_back(dialect, files, base=base, alpha=alpha)


def adapters_alpha(parts):
    """Return the alpha that a user of loralib would say; one stands for all there."""
    return alpha_of(parts[0].scaling, parts[0].rank, "alpha/r")


@pytest.mark.parametrize("dialect", DIALECTS)
def test_dense_deltas_are_those_of_the_source(dialect, bases):
    kind = "language" if "language" in DIALECTS[dialect].says else "components"
    targets = LANGUAGE if kind == "language" else PIPELINE
    adapter = adapters.source(*(adapters.part(t, rank=3, alpha=1.5) for t in targets))

    found = through(dialect, adapter, bases[kind], 1.5)

    for target, delta in adapters.deltas(adapter).items():
        np.testing.assert_array_equal(adapters.deltas(found)[target], delta)


def needing(feature, kind):
    """Return an adapter that cannot be said without the feature."""
    one, two = (Q0, K0) if kind == "language" else (TO_Q, TO_OUT)
    return adapters.source(
        *{
            "language": lambda: [adapters.part(Q0)],
            "components": lambda: [adapters.part(TO_Q)],
            "ranks": lambda: [
                adapters.part(one, rank=2, alpha=2),
                adapters.part(two, rank=4, alpha=4),
            ],
            "scalings": lambda: [
                adapters.part(one, alpha=2),
                adapters.part(two, alpha=3),
            ],
            # No alpha/3 is this number, see test_scalings_without_an_alpha.
            "rslora": lambda: [adapters.part(one, rank=3, alpha=1.6, rule="alpha/sqrt(r)")],
            "alpha64": lambda: [adapters.part(one, alpha=0.1)],
            "float64": lambda: [adapters.part(one, dtype="F64")],
        }[feature]()
    )


CASES = list(itertools.product(DIALECTS, FEATURES))


@pytest.mark.parametrize(("dialect", "feature"), CASES)
def test_table_of_what_each_dialect_says_is_true(dialect, feature, bases):
    says = DIALECTS[dialect].says
    kind = "language" if "language" in says else "components"
    base = bases[kind]
    if feature in ("language", "components"):
        kind = feature
        base = bases[kind] if feature in says else base
    adapter = needing(feature, kind)
    if feature == "ranks" and dialect in ("loralib", "gguf"):
        adapter = adapters.source(
            adapters.part(Q0, rank=2, alpha=2), adapters.part(K0, rank=4, alpha=2)
        )

    if feature in says:
        found = through(dialect, adapter, base, 2.0)
        if dialect != "loralib" or feature == "ranks":
            assert adapters.content(found) == adapters.content(adapter)
    else:
        with pytest.raises(LossyConversion) as error:
            adapters.written(dialect, adapter, base)
        assert error.value.losses


@settings(max_examples=500)
@given(st.floats(1e-6, 1e6), st.integers(1, 512), RULES)
def test_alpha_is_found_again_from_its_scaling(alpha, rank, rule):
    wanted = scaling(alpha, rank, rule)

    assert scaling(alpha_of(wanted, rank, rule), rank, rule) == wanted
    found, found_rule = spell(wanted, rank)
    assert scaling(found, rank, found_rule) == wanted


@settings(max_examples=500)
@given(st.floats(1e-6, 1e6), st.integers(1, 512))
def test_any_scaling_is_spelt_to_the_last_bit_but_one(wanted, rank):
    alpha, rule = spell(wanted, rank)

    assert abs(scaling(alpha, rank, rule) - wanted) <= math.ulp(wanted)


@settings(max_examples=500)
@given(st.floats(2**-20, 2**20, width=32), st.integers(1, 512))
def test_the_float32_alpha_is_found_whatever_float64_alpha_was_said(alpha, rank):
    scaled = alpha / rank
    part = adapters.part(Q0, rank=rank, alpha=alpha_of(scaled, rank, "alpha/r"))

    assert factors.float32_alpha(part) == alpha


def test_scalings_without_an_alpha():
    wanted = scaling(1.6, 3, "alpha/sqrt(r)")

    assert scaling(alpha_of(wanted, 3, "alpha/r"), 3, "alpha/r") != wanted


@pytest.mark.parametrize("dialect", DIALECTS)
def test_damaged_files_are_refused_with_an_error_of_ours_or_read(dialect, bases):
    kind = "language" if "language" in DIALECTS[dialect].says else "components"
    target = Q0 if kind == "language" else TO_Q
    adapter = adapters.source(adapters.part(target))
    files = adapters.written(dialect, adapter, bases[kind])
    name = DIALECTS[dialect].weights_name

    @settings(max_examples=150, deadline=None)
    @given(st.data())
    def holds(drawn):
        data = bytearray(files[name])
        for _ in range(drawn.draw(st.integers(1, 4))):
            # Nearly all that can be misread stands in the first bytes.
            at = drawn.draw(st.integers(0, min(len(data), 600) - 1))
            data[at] = drawn.draw(st.integers(0, 255))
        cut = drawn.draw(st.integers(0, len(data)))
        end = cut if drawn.draw(st.booleans()) else len(data)
        damaged = files | {name: bytes(data[:end])}

        with contextlib.suppress(LoraHubError):
            adapters.read_back(dialect, damaged, base=bases[kind], alpha=1.0)

    holds()
