"""What holds for every composition. The oracle is a dense ΔW in numpy's float64, summed one
rank-1 product at a time, and shares no code with the package."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_hub.adapter.adapter import Adapter
from lora_hub.adapter.load import load
from lora_hub.adapter.save import to_source
from lora_hub.adapter.update import Update, delta
from lora_hub.composing.compose import compose
from lora_hub.composing.methods import METHODS
from lora_hub.formats.detect import open_adapter

# beartype, which checks the annotations, draws which items of a list it looks at.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the .random. module inside")

ASSETS = Path(__file__).parents[1] / "assets" / "adapters"
OUT, INP = 5, 4
WEIGHT = np.random.default_rng(7).normal(size=(OUT, INP))
BIAS = np.random.default_rng(8).normal(size=OUT)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

weights = st.floats(-4, 4).filter(lambda w: w == 0 or abs(w) > 1e-6)
methods = st.sampled_from(sorted(METHODS))


@st.composite
def updates(draw):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rank = draw(st.integers(0, 4))
    dtype = draw(st.sampled_from(DTYPES))

    def vector(length):
        if not draw(st.booleans()):
            return None
        return torch.randn(length, generator=generator, dtype=torch.float64)

    return Update(
        a=torch.randn(rank, INP, generator=generator).to(dtype),
        b=torch.randn(OUT, rank, generator=generator).to(dtype),
        scaling=torch.randn(rank, generator=generator, dtype=torch.float64),
        p=vector(OUT),
        q=vector(INP),
        bias=vector(OUT),
        bias_scale=vector(OUT),
    )


@st.composite
def adapters(draw):
    return Adapter({target: draw(updates()) for target in draw(st.sampled_from(TARGETS))})


TARGETS = [("x",), ("y",), ("x", "y")]
parts = st.lists(st.tuples(adapters(), weights), min_size=1, max_size=4)


def dense(update):
    """Return ΔW and the bias of an update, entry by entry from the definition."""
    a, b = update.a.double().numpy(), update.b.double().numpy()
    change = np.zeros((OUT, INP))
    for row in range(a.shape[0]):
        change += float(update.scaling[row]) * np.outer(b[:, row], a[row])
    if update.p is not None:
        change += np.diag(update.p.numpy()) @ WEIGHT
    if update.q is not None:
        change += WEIGHT @ np.diag(update.q.numpy())
    bias = np.zeros(OUT) if update.bias is None else update.bias.numpy()
    if update.bias_scale is not None:
        bias = bias + np.diag(update.bias_scale.numpy()) @ BIAS
    return change, bias


def check_is_sum(result, terms, target):
    wanted, bias, size = np.zeros((OUT, INP)), np.zeros(OUT), 1.0
    for adapter, weight in terms:
        if target in adapter.updates:
            change, shift = dense(adapter.updates[target])
            wanted += weight * change
            bias += weight * shift
            size += abs(weight) * (np.abs(change).max() + np.abs(shift).max())
    found, found_bias = dense(result.updates[target])
    # A few dozen float64 operations, each off by at most 2**-53 of the largest term.
    assert np.abs(found - wanted).max() <= 1e-13 * size
    assert np.abs(found_bias - bias).max() <= 1e-13 * size


def bits(adapter):
    """Return every number of an adapter, to compare without tolerance."""
    names = ("a", "b", "scaling", "p", "q", "bias", "bias_scale")
    return {
        (target, name): None if tensor is None else (tensor.dtype, tensor.tolist())
        for target, update in adapter.updates.items()
        for name in names
        for tensor in [getattr(update, name)]
    }


@given(updates())
def test_delta_is_the_dense_definition(update):
    found = delta(update, torch.from_numpy(WEIGHT)).numpy()

    assert np.abs(found - dense(update)[0]).max() <= 1e-13 * (1 + np.abs(found).max())


@settings(deadline=None)
@given(parts, methods)
def test_composing_is_linear_in_the_weights(terms, method):
    result = compose(terms, method)

    assert set(result.updates) == {name for adapter, _ in terms for name in adapter.updates}
    for target in result.updates:
        check_is_sum(result, terms, target)


@settings(deadline=None)
@given(parts, st.randoms())
def test_linear_gives_the_same_bits_in_any_order(terms, random):
    shuffled = list(terms)
    random.shuffle(shuffled)

    assert bits(compose(terms)) == bits(compose(shuffled))


@settings(deadline=None)
@given(adapters(), methods)
def test_one_adapter_at_one_is_itself_bit_for_bit(adapter, method):
    assert bits(compose([(adapter, 1.0)], method)) == bits(adapter)


@settings(deadline=None)
@given(adapters(), weights)
def test_an_adapter_minus_itself_is_exactly_zero(adapter, weight):
    # A second adapter of equal bytes, not the same object.
    twin = Adapter(
        {
            target: Update(
                update.a.clone(), update.b.clone(), update.scaling, **terms_of(update)
            )
            for target, update in adapter.updates.items()
        }
    )

    nothing = compose([(adapter, weight), (twin, -weight)])

    for update in nothing.updates.values():
        assert all(term is None for term in terms_of(update).values())
        assert update.rank <= 1  # none where there were no factors
        assert not update.a.any()
        assert not update.b.any()


@settings(deadline=None)
@given(adapters(), adapters(), weights, weights)
def test_what_cancels_leaves_the_rest_as_if_it_had_never_been_there(one, other, w, v):
    left = compose([(one, w), (other, v), (one, -w)])

    for target, update in compose([(other, v)]).updates.items():
        change, _ = dense(update)
        assert np.array_equal(dense(left.updates[target])[0], change)


@settings(deadline=None)
@given(parts)
def test_cat_and_linear_are_the_same_sum(terms):
    linear, cat = compose(terms, "linear"), compose(terms, "cat")

    for target, update in cat.updates.items():
        change, bias = dense(update)
        found, found_bias = dense(linear.updates[target])
        assert np.abs(found - change).max() <= 1e-12 * (1 + np.abs(change).max())
        assert np.abs(found_bias - bias).max() <= 1e-12 * (1 + np.abs(bias).max())


@settings(deadline=None)
@given(parts)
def test_cat_keeps_all_rows_in_the_order_given(terms):
    for target, update in compose(terms, "cat").updates.items():
        sources = [each.updates[target] for each, _ in terms if target in each.updates]
        rows = [row for source in sources for row in source.a.double().tolist()]
        assert update.a.double().tolist() == rows


@settings(deadline=None)
@given(parts, parts, weights)
def test_composing_what_was_composed_is_composing_at_once(first, second, weight):
    inner = compose(first)

    result = compose([(inner, weight), *second])

    flat = [(adapter, weight * each) for adapter, each in first] + second
    for target in result.updates:
        check_is_sum(result, flat, target)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sum_of_dtypes_loses_no_bit(dtype):
    torch.manual_seed(1)
    wide = Update(torch.randn(2, INP), torch.randn(OUT, 2), torch.ones(2).double())
    narrow = Update(
        torch.randn(2, INP).to(dtype), torch.randn(OUT, 2).to(dtype), torch.ones(2).double()
    )
    terms = [(Adapter({"x": wide}), 1.0), (Adapter({"x": narrow}), 1.0)]

    result = compose(terms, "cat").updates["x"]

    assert result.a[2:].double().tolist() == narrow.a.double().tolist()
    assert result.a[:2].double().tolist() == wide.a.double().tolist()


@pytest.mark.parametrize("name", ["shakespeare", "milton"])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_real_adapter_composed_and_saved_is_itself_bit_for_bit(name, method):
    adapter = load(open_adapter(ASSETS / name))

    composed = compose([(adapter, 1.0)], method)
    saved = load(to_source(composed))

    for target, update in adapter.updates.items():
        for factor in ("a", "b", "scaling"):
            found = getattr(composed.updates[target], factor)
            assert torch.equal(found, getattr(update, factor))
        assert torch.equal(delta(composed.updates[target]), delta(update))
        assert torch.equal(delta(saved.updates[target]), delta(update))


@pytest.mark.parametrize("name", ["shakespeare", "milton"])
def test_a_real_adapter_minus_itself_is_exactly_zero(name):
    one, twin = (load(open_adapter(ASSETS / name)) for _ in range(2))

    nothing = compose([(one, 0.3), (twin, -0.3)])

    assert nothing.updates.keys() == one.updates.keys()
    assert not any(delta(update).any() for update in nothing.updates.values())


def terms_of(update):
    found = {name: getattr(update, name) for name in ("p", "q", "bias", "bias_scale")}
    return {name: None if term is None else term.clone() for name, term in found.items()}
