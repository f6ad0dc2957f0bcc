"""The kernels under Triton's interpreter; `test_grouped.py` runs this file."""

import os

assert os.environ.get("TRITON_INTERPRET") == "1", "run test_grouped.py"

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_hub.errors import InputError
from lora_hub.kernels.grouped import (
    add_grouped,
    expand_grouped,
    is_available,
    shrink_grouped,
)
from lora_hub.kernels.rows import RowLists
from lora_hub.kernels.table import Table
from tests.grouped import Case

HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES)
WEIGHTS = st.sampled_from([1.0, 0.5, -1.0, 0.3, -2.7, 1e-3, 40.0])


@st.composite
def cases(draw, tokens):
    dtype = draw(st.sampled_from(DTYPES))
    slots = range(draw(st.integers(1, 4)))
    ranks = {
        slot: (
            draw(
                st.one_of(st.integers(0, 70), st.sampled_from([1, 8, 15, 16, 17, 32, 64]))
            ),
            draw(st.sampled_from([dtype, torch.float32])),
        )
        for slot in slots
    }
    pairs = st.tuples(st.sampled_from(slots), WEIGHTS)
    return Case(
        lists=draw(st.lists(st.lists(pairs, max_size=3), min_size=1, max_size=5)),
        ranks=ranks,
        inp=draw(st.one_of(st.integers(1, 100), st.sampled_from([256, 257, 600, 1100]))),
        out=draw(st.one_of(st.integers(1, 100), st.sampled_from([64, 65, 128, 200]))),
        tokens=draw(tokens),
        dtype=dtype,
        seed=draw(st.integers(0, 99)),
        site=draw(st.integers(0, 9)),
    )


def added(case, table=None, rows=None):
    y = case.y.clone()
    add_grouped(y, case.x, table or case.table(), case.site, rows or case.rows())
    return y


def test_the_interpreter_counts_as_a_device_for_tests():
    assert is_available("cpu")


@settings(max_examples=25)
@given(cases(tokens=st.just(1)))
def test_one_token_a_row_is_the_reference_rounded_once(case):
    case.check(added(case))


@settings(max_examples=25)
@given(cases(tokens=st.integers(2, 40)))
def test_many_tokens_a_row_are_the_reference_rounded_once(case):
    case.check(added(case))


@settings(max_examples=6)
@given(cases(tokens=st.sampled_from([1, 1, 5, 17])))
def test_a_row_is_bit_for_bit_what_it_is_alone(case):
    together = added(case)

    for row, pairs in enumerate(case.lists):
        own = slice(row * case.tokens, (row + 1) * case.tokens)
        rows = RowLists("cpu")
        rows.write([pairs])
        alone = case.y[own].clone()
        add_grouped(alone, case.x[own], case.table(), case.site, rows)

        if case.tokens == 1:
            assert torch.equal(alone, together[own])
        else:  # more rows leave fewer parts to each, and so another order of the sum
            eps = torch.finfo(case.dtype).eps
            torch.testing.assert_close(alone, together[own], rtol=2 * eps, atol=1e-3)


@pytest.mark.parametrize("tokens", [1, 4])
def test_bare_rows_and_minus_zero_keep_their_bits(tokens):
    case = Case(
        lists=[
            [],
            [(0, 1.0)],
            [(1, 1.0)],
            [(2, 1.0)],
        ],  # slot 1 has not this site, 2 nothing
        ranks={0: (3, torch.float32), 1: (0, torch.float32)},
        tokens=tokens,
    )
    case.y[:] = -0.0

    found = added(case)

    bare = torch.arange(4).repeat_interleave(tokens) != 1
    assert torch.signbit(found[bare]).all()
    assert (found[~bare] != 0).all()


def test_the_same_call_gives_the_same_bits():
    case = Case(
        lists=[[(0, 1.0), (1, -0.4)], [(1, 2.0)]],
        ranks={0: (33, torch.bfloat16), 1: (7, torch.float32)},
        inp=1100,
        dtype=torch.bfloat16,
    )

    assert torch.equal(added(case), added(case))


def test_siblings_share_one_shrink():
    sites, outs = (2, 5, 7), (24, 8, 70)
    case = Case(lists=[[(0, 0.5)], [], [(1, 2.0), (0, 1.0)]], ranks={}, inp=300)
    table = Table("cpu", torch.float32)
    made = {}
    for slot, ranks in {0: (4, 17, 1), 1: (40, 0, 16)}.items():
        made[slot] = {
            site: (torch.randn(rank, 300), torch.randn(rank, out))
            for site, out, rank in zip(sites, outs, ranks, strict=True)
            if rank
        }
        table.put(slot, made[slot])
    rows = case.rows()

    shrunk = shrink_grouped(case.x, table, sites, rows)

    for site, out, t in zip(sites, outs, shrunk, strict=True):
        y = torch.randn(3, out)
        found = y.clone()
        expand_grouped(found, t, table, site, rows)
        case.factors = {slot: at[site] for slot, at in made.items() if site in at}
        case.ranks = {0: (40, torch.float32), 1: (40, torch.float32)}
        case.check(found, y=y)


def test_a_swap_and_other_rows_are_read_from_the_same_tensors():
    case = Case(lists=[[(0, 1.0)], []], ranks={0: (5, torch.float32)})
    table, rows = case.table(max_rank=64), case.rows()
    addresses = [each.data_ptr() for each in (table.cells, rows.first, rows.weight)]
    case.check(added(case, table, rows))

    other = Case(lists=[[], [(0, -3.0)]], ranks={0: (41, torch.float32)}, seed=1)
    table.put(0, {other.site: other.factors[0]})
    rows.write(other.lists)

    other.check(added(other, table, rows))
    assert [each.data_ptr() for each in (table.cells, rows.first, rows.weight)] == addresses


def test_one_set_for_all_rows_is_written_once():
    case = Case(
        lists=[[(0, 1.0), (1, 0.5)]] * 6, ranks=dict.fromkeys((0, 1), (4, torch.float32))
    )
    rows = RowLists("cpu", rows=6, entries=2, per_row=2)

    for count in (1, 2, 3, 6):
        rows.write_all(case.lists[0], rows=count)
        case.check(added(case, rows=rows))


def test_x_and_y_may_be_views_with_any_leading_axes():
    case = Case(lists=[[(0, 1.0)], [(0, 2.0)]], ranks={0: (4, torch.float32)}, tokens=3)
    wide = torch.zeros(2, 3, 2 * case.out)
    view = wide[..., : case.out]
    view.copy_(case.y.view(2, 3, -1))
    x = torch.randn(2, 3, 3 * case.inp)[..., case.inp : 2 * case.inp]

    add_grouped(view, x, case.table(), case.site, case.rows())

    case.check(view.reshape(6, -1), x=x.reshape(6, -1))
    assert not wide[..., case.out :].any()


def test_half_x_may_have_a_float32_output():
    case = Case(
        lists=[[(0, 1.0)], [(1, 1.0)]],
        ranks={0: (20, torch.bfloat16), 1: (5, torch.float32)},
        dtype=torch.bfloat16,
        tokens=3,
    )
    y = case.y.float()
    found = y.clone()

    add_grouped(found, case.x, case.table(), case.site, case.rows())

    case.check(found, y=y)


def test_no_tokens_and_no_features_are_nothing_to_add():
    case = Case(lists=[[(0, 1.0)]], ranks={0: (4, torch.float32)})
    table, rows = case.table(), case.rows()

    add_grouped(torch.zeros(0, case.out), torch.zeros(0, case.inp), table, case.site, rows)


def refused(case, *, y=None, x=None, table=None, site=None, rows=None):
    with pytest.raises(InputError) as caught:
        add_grouped(
            case.y if y is None else y,
            case.x if x is None else x,
            table or case.table(),
            case.site if site is None else site,
            rows or case.rows(),
        )
    return str(caught.value)


def test_refuses_what_the_kernels_would_read_past():
    case = Case(lists=[[(0, 1.0)], []], ranks={0: (4, torch.float32)})

    assert "2 rows do not share equally" in refused(case, x=torch.zeros(3, 40))
    assert "x has 39 features, not 40" in refused(case, x=torch.zeros(2, 39))
    assert "y has 23 features, not 24" in refused(case, y=torch.zeros(2, 23))
    assert "y has 4 tokens, x had 2" in refused(case, y=torch.zeros(4, 24))
    assert "torch.float64" in refused(case, x=case.x.double())
    assert "cannot be added to in place" in refused(case, y=torch.zeros(24, 2).T)
    assert "site -1" in refused(case, site=-1)
    assert "x wants gradients" in refused(case, x=case.x.clone().requires_grad_())


def test_a_slot_or_site_beyond_the_table_is_bare():
    case = Case(lists=[[(99, 1.0)], [(0, 1.0)]], ranks={0: (4, torch.float32)})
    y = case.y.clone()

    add_grouped(y, case.x, case.table(), 77, case.rows())

    assert torch.equal(y, case.y)


def test_refuses_a_t_that_the_table_has_outgrown():
    case = Case(lists=[[(0, 1.0)]], ranks={0: (4, torch.float32)})
    table, rows = case.table(), case.rows()
    (t,) = shrink_grouped(case.x, table, (case.site,), rows)
    table.reserve(max_rank=99)

    with pytest.raises(InputError, match="grew since t was taken"):
        expand_grouped(case.y, t, table, case.site, rows)
