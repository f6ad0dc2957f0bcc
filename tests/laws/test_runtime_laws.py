"""What holds for every batch of rows on a live model; the oracles stand in `tests/nets.py`.

Adapters, ranks, targets, dtypes and batches are random. The error against float64 is at
most twice that of the same formula in plain torch in the net's dtype.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lora_hub
from lora_hub.adapter.adapter import Adapter
from tests import nets

# beartype, which checks the annotations, draws which items of a list it looks at.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the .random. module inside")

NAMES = ["one", "two", "three"]


def attached(found, loaded):
    host = lora_hub.attach(found)
    for name, adapter in loaded.items():
        host.load(adapter, as_=name)
    return host


def batch(found, rows, seed=0):
    """Return the input of a net in its dtype, and in float64."""
    x = found.batch(rows, seed)
    dtype = found.head.weight.dtype
    # Rounded first: the truth is about the numbers that the net is given.
    return (x.to(dtype), x.to(dtype).double()) if x.is_floating_point() else (x, x)


def expected(found, x, wide, entries, loaded):
    """Return the truth in float64 and plain torch's answer, each row run alone."""
    acting = [nets.acting_of(entry, loaded) for entry in entries]
    rows = [slice(row, row + 1) for row in range(len(entries))]
    with torch.no_grad():
        wanted = [
            nets.exact(found, each)(wide[row])
            for row, each in zip(rows, acting, strict=True)
        ]
        plain = [
            nets.plain(found, each)(x[row]) for row, each in zip(rows, acting, strict=True)
        ]
    return torch.cat(wanted), torch.cat(plain)


@settings(max_examples=60)
@given(st.data(), nets.drawn(NAMES), st.sampled_from(sorted(nets.MODES)))
def test_row_i_of_a_mixed_batch_is_row_i_alone(data, draw, mode):
    found, loaded = draw.made()
    entries = data.draw(nets.batches(NAMES))
    x, wide = batch(found, len(entries))
    host = attached(found, loaded)

    with nets.MODES[mode](), host.rows(entries):
        mixed = found(x)

    wanted, plain = expected(found, x, wide, entries, loaded)
    for row in range(len(entries)):
        nets.check_is_as_exact_as_plain(mixed[row], wanted[row], plain[row], draw.dtype)


@settings(max_examples=25)
@given(st.data(), nets.drawn(NAMES), st.randoms())
def test_the_order_of_rows_does_not_matter(data, draw, random):
    found, loaded = draw.made()
    entries = data.draw(nets.batches(NAMES))
    x, wide = batch(found, len(entries))
    host = attached(found, loaded)
    order = list(range(len(entries)))
    random.shuffle(order)

    with torch.no_grad(), host.rows([entries[row] for row in order]):
        mixed = found(x[order])

    wanted, plain = expected(found, x, wide, entries, loaded)
    for place, row in enumerate(order):
        nets.check_is_as_exact_as_plain(mixed[place], wanted[row], plain[row], draw.dtype)


@settings(max_examples=25)
@given(st.data(), nets.drawn(NAMES))
def test_rows_of_no_adapter_are_the_bare_base_bit_for_bit(data, draw):
    found, loaded = draw.made()
    entries = data.draw(nets.batches([*NAMES, "one"]))
    x, _ = batch(found, len(entries))
    with torch.no_grad():
        bare = found(x)
    host = attached(found, loaded)

    with torch.no_grad(), host.rows(entries):
        mixed = found(x)

    for row, entry in enumerate(entries):
        if not nets.acting_of(entry, loaded):
            assert torch.equal(mixed[row], bare[row])


@settings(max_examples=25)
@given(st.data(), nets.drawn(NAMES), st.integers(2, 3))
def test_an_entry_stands_for_each_of_its_rows(data, draw, each):
    found, loaded = draw.made()
    entries = data.draw(nets.batches(NAMES, most=3))
    spread = [entry for entry in entries for _ in range(each)]
    x, _ = batch(found, len(spread))
    host = attached(found, loaded)

    with torch.no_grad(), host.rows(entries, each=each):
        together = found(x)
    with torch.no_grad(), host.rows(spread):
        one_by_one = found(x)

    assert torch.equal(together, one_by_one)


@settings(max_examples=25)
@given(nets.drawn(NAMES), st.tuples(nets.weights, nets.weights, nets.weights))
def test_using_a_sum_is_every_row_using_it_and_the_truth(draw, values):
    found, loaded = draw.made()
    entry = dict(zip(NAMES, values, strict=True))
    x, wide = batch(found, 3)
    host = attached(found, loaded)

    host.use(entry)
    with torch.no_grad():
        used = found(x)
    host.use(None)
    with torch.no_grad(), host.rows([entry] * 3):
        routed = found(x)

    acting = nets.acting_of(entry, loaded)
    with torch.no_grad():
        wanted, plain = nets.exact(found, acting)(wide), nets.plain(found, acting)(x)
    nets.check_is_as_exact_as_plain(used, wanted, plain, draw.dtype)
    nets.check_is_as_exact_as_plain(routed, wanted, plain, draw.dtype)


LINEAR_PARTS = ((), ("p", "bias_scale"), ("q",))  # what a sum of layers without bias holds


@settings(max_examples=20)
@given(
    nets.drawn(NAMES, dtypes=[torch.float32], parts=LINEAR_PARTS),
    st.tuples(nets.weights, nets.weights, nets.weights),
)
def test_a_sum_used_composed_and_merged_is_one(draw, values):
    found, loaded = draw.made()
    entry = dict(zip(NAMES, values, strict=True))
    x, wide = batch(found, 3)
    acting = nets.acting_of(entry, loaded)
    with torch.no_grad():
        wanted = nets.exact(found, acting)(wide)
        plain = nets.plain(found, acting)(x)
        dense = nets.exact(found, acting, torch.float32)(x)
    host = attached(found, loaded)
    composed = lora_hub.compose([(loaded[name], weight) for name, weight in entry.items()])
    host.load(composed, as_="composed")

    found_by = {}
    with torch.no_grad():
        with host.using(entry):
            found_by["used"] = found(x)
        with host.using("composed"):
            found_by["composed"] = found(x)
        host.use(entry)
        host.merge()
        found_by["merged"] = found(x)
        host.unmerge()

    limit = max(plain, dense, key=lambda y: (y.double() - wanted).norm())
    for answer in found_by.values():
        nets.check_is_as_exact_as_plain(answer, wanted, limit, torch.float32)


@given(nets.drawn(NAMES))
@settings(max_examples=20)
def test_a_weight_of_zero_is_the_base_bit_for_bit(draw):
    found, loaded = draw.made()
    x, _ = batch(found, 2)
    with torch.no_grad():
        bare = found(x)
    host = attached(found, loaded)

    host.use({"one": 0.0, "two": 0})
    with torch.no_grad():
        used = found(x)
    with torch.no_grad(), host.rows([{"one": 0.0}, {}]):
        routed = found(x)

    assert torch.equal(used, bare)
    assert torch.equal(routed, bare)


@given(nets.drawn(NAMES))
@settings(max_examples=20)
def test_unloaded_and_loaded_again_is_loaded_bit_for_bit(draw):
    found, loaded = draw.made()
    x, _ = batch(found, 3)
    host = attached(found, loaded)
    entries = ["one", None, {"two": 0.5, "one": -1.0}]

    with torch.no_grad(), host.rows(entries):
        first = found(x)
    host.unload("one")
    host.unload("two")
    host.load(loaded["two"], as_="two")
    host.load(loaded["one"], as_="one")
    with torch.no_grad(), host.rows(entries):
        again = found(x)

    assert torch.equal(first, again)


@given(nets.drawn(NAMES))
@settings(max_examples=20)
def test_swapped_there_and_back_is_as_before_and_between_as_loaded_fresh(draw):
    found, loaded = draw.made()
    x, _ = batch(found, 3)
    host = attached(found, loaded)
    entries = ["one", {"one": 0.5, "three": 2.0}, None]
    host.load(Adapter(loaded["two"].updates), as_="fresh")

    def answer(entries):
        with torch.no_grad(), host.rows(entries):
            return found(x)

    before = answer(entries)
    fresh = answer(["fresh", {"fresh": 0.5, "three": 2.0}, None])
    host.swap("one", loaded["two"])
    swapped = answer(entries)
    host.swap("one", loaded["one"])

    assert torch.equal(swapped, fresh)
    assert torch.equal(answer(entries), before)


@given(st.data(), nets.drawn(NAMES, kinds=[nets.Signals]))
@settings(max_examples=25)
def test_gradients_reach_the_input_of_every_row(data, draw):
    found, loaded = draw.made()
    entries = data.draw(nets.batches(NAMES, most=4))
    x, wide = batch(found, len(entries))
    host = attached(found, loaded)
    found.requires_grad_(requires_grad=False)

    def gradient(run, x):
        x = x.clone().requires_grad_()
        y = run(x)
        y.backward(torch.linspace(-1, 1, y.numel()).reshape(y.shape).to(y.dtype))
        return x.grad

    with host.rows(entries):
        mixed = gradient(found, x)

    for row, entry in enumerate(entries):
        acting, one = nets.acting_of(entry, loaded), slice(row, row + 1)

        def of_row(run, x, row=row, one=one):
            x = x[one].clone().requires_grad_()
            y = run(x)
            whole = torch.linspace(-1, 1, len(entries) * y.numel())
            whole = whole.reshape(len(entries), *y.shape[1:])
            y.backward(whole[one].to(y.dtype))
            return x.grad

        wanted = of_row(nets.exact(found, acting), wide)
        plain = of_row(nets.plain(found, acting), x)
        nets.check_is_as_exact_as_plain(mixed[one], wanted, plain, x.dtype)


@given(st.data(), nets.drawn(NAMES, dtypes=[torch.float32]))
@settings(max_examples=20)
def test_under_autocast_a_row_is_as_exact_as_plain_torch_under_autocast(data, draw):
    found, loaded = draw.made()
    entries = data.draw(nets.batches(NAMES, most=4))
    x, wide = batch(found, len(entries))
    host = attached(found, loaded)

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), host.rows(entries):
        mixed = found(x)

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        bare = found(x)
    wanted, plain = [], []
    for row, entry in enumerate(entries):
        acting, one = nets.acting_of(entry, loaded), slice(row, row + 1)
        with torch.no_grad():
            wanted.append(nets.exact(found, acting)(wide[one]))
            with torch.autocast("cpu", torch.bfloat16):
                plain.append(nets.plain(found, acting)(x[one]))
    assert mixed.dtype == bare.dtype
    for got, exact, other in zip(mixed, torch.cat(wanted), torch.cat(plain), strict=True):
        nets.check_is_as_exact_as_plain(got, exact, other, torch.bfloat16)
