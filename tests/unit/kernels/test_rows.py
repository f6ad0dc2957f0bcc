"""Rows of a batch are written in place, and grow only while no graph reads them."""

import pytest
import torch

from lora_hub.errors import InputError
from lora_hub.kernels.rows import RowLists


def read(rows):
    return [
        list(zip(rows.slot[b:e].tolist(), rows.weight[b:e].tolist(), strict=True))
        for b, e in zip(rows.first.tolist(), rows.last.tolist(), strict=True)
    ]


def test_rows_of_one_set_share_its_entries():
    rows = RowLists("cpu", rows=8, entries=4)
    lists = [[(3, 0.5), (1, 2.0)], [], [(1, 2.0)], [(3, 0.5), (1, 2.0)], [(1, 2.0)]]

    rows.write(lists)

    assert read(rows) == [*lists, [], [], []]
    assert (rows.count, rows.most_slot) == (5, 3)


def test_fewer_rows_leave_nothing_of_those_before():
    rows = RowLists("cpu", rows=4)
    rows.write([[(1, 1.0)]] * 4)

    rows.write([[], [(2, -1.0)]])

    assert read(rows) == [[], [(2, -1.0)], [], []]


def test_one_set_for_all_keeps_the_number_of_rows_of_a_captured_graph():
    rows = RowLists("cpu", rows=4)
    rows.write([[], [(2, 1.0)], []])
    rows.captured = True

    rows.write_all([(0, 0.25)])

    assert rows.count == 3
    assert read(rows) == [[(0, 0.25)]] * 3 + [[]]


def test_rows_grow_until_a_graph_reads_them():
    rows = RowLists("cpu", rows=4, entries=4, per_row=1)
    rows.write([[(slot, 1.0), (0, 1.0)] for slot in range(9)])
    assert len(read(rows)) == 12
    rows.captured = True
    before, address = read(rows), rows.slot.data_ptr()

    with pytest.raises(InputError, match="reads 9 rows, where 8 are given"):
        rows.write([[]] * 8)
    with pytest.raises(InputError, match="2 of one row, where"):
        rows.write([[(0, 1.0), (1, 1.0), (2, 1.0)], *[[]] * 8])

    assert read(rows) == before
    assert rows.slot.data_ptr() == address


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), 1e39])
def test_refuses_weights_that_are_no_finite_float32(weight):
    rows = RowLists("cpu")
    rows.write([[(1, 1.0)]])

    with pytest.raises(InputError, match="no finite number in float32"):
        rows.write([[(0, weight)]])

    assert read(rows)[0] == [(1, 1.0)]


def test_refuses_a_batch_without_rows():
    with pytest.raises(InputError, match="no row"):
        RowLists("cpu").write([])


def test_refuses_a_negative_slot():
    with pytest.raises(InputError, match="slot -1 is negative"):
        RowLists("cpu").write([[(-1, 1.0)]])


def test_rows_made_in_inference_mode_may_be_written_outside_of_it():
    with torch.inference_mode():
        rows = RowLists("cpu")

    rows.write([[(0, 1.0)]])

    assert read(rows)[0] == [(0, 1.0)]
