"""The grouped product on a GPU: as the reference has it, and inside of a CUDA graph."""

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

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or not is_available("cuda"),
        reason="no GPU with Triton",
    ),
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RANKS = st.one_of(st.integers(0, 70), st.sampled_from([8, 16, 32, 64, 128, 256]))
WIDTHS = st.one_of(st.integers(1, 300), st.sampled_from([2048, 4096, 14336]))


@st.composite
def cases(draw):
    dtype = draw(st.sampled_from(DTYPES))
    slots = range(draw(st.integers(1, 5)))
    pairs = st.tuples(
        st.sampled_from(slots), st.sampled_from([1.0, 0.5, -1.0, 0.3, -2.7, 1e-3, 40.0])
    )
    return Case(
        lists=draw(st.lists(st.lists(pairs, max_size=3), min_size=1, max_size=9)),
        ranks={
            slot: (draw(RANKS), draw(st.sampled_from([dtype, torch.float32])))
            for slot in slots
        },
        inp=draw(WIDTHS),
        out=draw(WIDTHS),
        tokens=draw(st.sampled_from([1, 1, 1, 2, 16, 17, 100])),
        dtype=dtype,
        device="cuda",
        seed=draw(st.integers(0, 99)),
        site=draw(st.integers(0, 9)),
    )


def added(case, table=None, rows=None):
    y = case.y.clone()
    add_grouped(y, case.x, table or case.table(), case.site, rows or case.rows())
    return y


@settings(max_examples=150)
@given(cases())
def test_any_batch_is_the_reference_rounded_once(case):
    case.check(added(case))


@settings(max_examples=20)
@given(cases())
def test_the_same_call_gives_the_same_bits(case):
    table, rows = case.table(), case.rows()

    assert torch.equal(added(case, table, rows), added(case, table, rows))


@pytest.mark.parametrize("dtype", DTYPES)
def test_sixty_four_rows_of_as_many_adapters_are_each_what_they_are_alone(dtype):
    case = Case(
        lists=[[(row, 0.5 + row / 64)] for row in range(64)],
        ranks={row: (8 + row % 57, dtype) for row in range(64)},
        inp=4096,
        out=1024,
        dtype=dtype,
        device="cuda",
    )
    table = case.table()
    together = added(case, table)
    case.check(together)

    for row in (0, 31, 63):
        rows = RowLists("cuda")
        rows.write([case.lists[row]])
        alone = case.y[row : row + 1].clone()
        add_grouped(alone, case.x[row : row + 1], table, case.site, rows)
        assert torch.equal(alone[0], together[row])


def captured(call):
    """Return a graph of what `call` does, warmed up on a stream of its own."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


@pytest.mark.parametrize("tokens", [1, 20])
def test_one_captured_graph_stays_right_through_a_hundred_swaps_of_mixed_rank(tokens):
    room = {"sites": 4, "slots": 4, "max_rank": 64}
    shape = {"inp": 512, "out": 384, "dtype": torch.bfloat16, "device": "cuda"}

    def case(number):
        ranks = {slot: ((7 * number + 13 * slot) % 65, torch.bfloat16) for slot in range(4)}
        lists = [
            [
                ((number + row + k) % 4, 1.0 - 0.3 * k - row)
                for k in range((row + number) % 3)
            ]
            for row in range(6)
        ]
        return Case(lists=lists, ranks=ranks, tokens=tokens, seed=number, **shape)

    first = case(1)
    table, rows = first.table(**room), first.rows(rows=6, entries=24, per_row=2)
    x, y, given_y = first.x.clone(), first.y.clone(), first.y.clone()

    def call():
        y.copy_(given_y)
        add_grouped(y, x, table, first.site, rows)

    graph = captured(call)

    assert table.captured
    assert rows.captured
    for number in range(100):
        now = case(number)
        for slot in range(4):
            at = {now.site: now.factors[slot]} if slot in now.factors else {}
            table.put(slot, at)
        rows.write(now.lists)
        x.copy_(now.x)
        given_y.copy_(now.y)

        graph.replay()

        now.check(y)


def test_one_set_for_all_reaches_a_graph_that_was_captured_with_rows():
    case = Case(
        lists=[[(0, 1.0)], [], [(1, 2.0)]],
        ranks={0: (5, torch.float32), 1: (40, torch.float32)},
        device="cuda",
    )
    table, rows = case.table(), case.rows()
    y = case.y.clone()

    def call():
        y.copy_(case.y)
        add_grouped(y, case.x, table, case.site, rows)

    graph = captured(call)
    rows.write_all([(1, -0.5)])
    graph.replay()

    case.lists = [[(1, -0.5)]] * 3
    case.check(y)


def test_what_a_graph_reads_is_neither_written_in_a_capture_nor_moved_after_it():
    case = Case(lists=[[(0, 1.0)]], ranks={0: (5, torch.float32)}, device="cuda")
    table, rows = case.table(), case.rows()
    y = case.y.clone()
    captured(lambda: add_grouped(y, case.x, table, case.site, rows))

    with pytest.raises(InputError, match="a captured graph reads room"):
        table.put(99, {})
    with pytest.raises(InputError, match="a captured graph reads 1 rows"):
        rows.write([[], []])

    def write_in_a_capture():
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            torch.zeros(1, device="cuda")  # a capture of nothing warns
            rows.write([[]])

    with pytest.raises(InputError, match="a CUDA graph is being captured"):
        write_in_a_capture()


def test_siblings_share_one_shrink():
    case = Case(
        lists=[[(0, 0.5)], [], [(1, 2.0), (0, 1.0)]], ranks={}, inp=300, device="cuda"
    )
    made = {
        slot: {
            site: tuple(torch.randn(rank, width, device="cuda") for width in (300, out))
            for site, (out, rank) in {
                2: (24, 4 + slot),
                5: (8, 40),
                7: (70, 16 - slot),
            }.items()
        }
        for slot in (0, 1)
    }
    table, rows = Table("cuda", torch.float32), case.rows()
    for slot, at in made.items():
        table.put(slot, at)

    shrunk = shrink_grouped(case.x, table, (2, 5, 7), rows)

    case.ranks = {0: (40, torch.float32), 1: (40, torch.float32)}
    for site, t in zip((2, 5, 7), shrunk, strict=True):
        case.factors = {slot: at[site] for slot, at in made.items()}
        y = torch.randn(3, case.factors[0][1].shape[1], device="cuda")
        found = y.clone()
        expand_grouped(found, t, table, site, rows)
        case.check(found, y=y)


def test_tokens_past_two_to_the_31_elements_are_reached():
    out, tokens = 2**17, 2**14 + 8
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB")
    factors = (
        torch.randn(4, 64, device="cuda", dtype=torch.bfloat16),
        torch.randn(4, out, device="cuda", dtype=torch.bfloat16),
    )
    table, rows = Table("cuda", torch.bfloat16), RowLists("cuda")
    table.put(0, {0: factors})
    rows.write([[(0, 1.0)]])
    x = torch.randn(tokens, 64, device="cuda", dtype=torch.bfloat16)
    y = torch.zeros(tokens, out, device="cuda", dtype=torch.bfloat16)

    add_grouped(y, x, table, 0, rows)

    last = x[-8:].double() @ factors[0].double().T @ factors[1].double()
    torch.testing.assert_close(y[-8:].double(), last, rtol=2**-7, atol=1e-2)
