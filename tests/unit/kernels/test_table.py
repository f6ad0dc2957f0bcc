"""A table is written in place, checked first, and grows only while no graph reads it."""

import pytest
import torch

from lora_hub.errors import InputError
from lora_hub.kernels.table import Table


def factors(rank=4, inp=8, out=16, dtype=torch.float32):
    return torch.ones(rank, inp, dtype=dtype), torch.ones(rank, out, dtype=dtype)


def small(**room):
    return Table("cpu", torch.bfloat16, **({"sites": 4, "slots": 2, "max_rank": 8} | room))


def test_a_cell_holds_addresses_rank_and_whether_it_is_float32():
    table, wide, narrow = small(), factors(), factors(rank=3, dtype=torch.bfloat16)

    table.put(1, {2: wide, 0: narrow})

    assert table.cells[1, 2].tolist() == [wide[0].data_ptr(), wide[1].data_ptr(), 4, 1]
    assert table.cells[1, 0].tolist() == [narrow[0].data_ptr(), narrow[1].data_ptr(), 3, 0]
    assert not table.cells[0].any()
    assert not table.cells[1, 1].any()


def test_other_factors_in_a_slot_leave_nothing_of_those_before():
    table = small()
    table.put(1, {0: factors(), 2: factors()})
    table.put(0, {0: factors()})
    neighbour = table.cells[0].clone()

    table.put(1, {3: factors(rank=1)})

    assert table.cells[1, :3].count_nonzero() == 0
    assert table.cells[1, 3, 2] == 1
    assert torch.equal(table.cells[0], neighbour)
    table.clear(1)
    assert not table.cells[1].any()


def test_factors_live_as_long_as_their_slot_stands_for_them():
    import weakref

    table, (a, bt) = small(), factors()
    alive = weakref.ref(a)
    table.put(0, {0: (a, bt)})
    del a, bt

    assert alive() is not None
    table.put(0, {})
    assert alive() is None


def test_growing_keeps_what_is_there():
    table = small()
    table.put(1, {3: factors()})
    before = table.cells.clone()

    table.put(9, {40: factors(rank=30)})

    assert (table.slots, table.sites, table.max_rank) == (10, 41, 30)
    assert torch.equal(table.cells[:2, :4], before)


def test_what_a_captured_graph_reads_grows_no_more_and_is_still_written():
    table = small()
    table.captured = True
    address = table.cells.data_ptr()

    table.put(1, {3: factors(rank=8)})
    for wrong in ((2, {0: factors()}), (0, {4: factors()}), (0, {0: factors(rank=9)})):
        with pytest.raises(InputError, match="a captured graph reads room for 2 slots"):
            table.put(*wrong)

    assert table.cells.data_ptr() == address
    assert not table.cells[0].any()


def unaligned(rank=4, inp=8):
    return torch.ones(rank * inp + 1)[1:].view(rank, inp)


@pytest.mark.parametrize(
    ("a", "bt", "message"),
    [
        (
            torch.ones(3, 8),
            torch.ones(4, 16),
            "expected \\(rank, in\\) and \\(rank, out\\)",
        ),
        (torch.ones(2, 4, 8), torch.ones(2, 4, 16), "expected \\(rank, in\\)"),
        (*factors(dtype=torch.float16), "torch.float16, the kernels read torch.bfloat16"),
        (torch.ones(4, 8), factors(dtype=torch.bfloat16)[1], "bt is torch.bfloat16"),
        (torch.ones(8, 4).T, torch.ones(4, 16), "a does not lie in one piece"),
        (unaligned(), torch.ones(4, 16), "a does not lie in one piece"),
        (torch.ones(4, 8, device="meta"), torch.ones(4, 16), "a is on meta"),
        (torch.ones(4, 9), torch.ones(4, 16), "take 9 and give 16 features, the layer 8"),
    ],
)
def test_refuses_factors_the_kernels_would_misread_and_changes_nothing(a, bt, message):
    table = small()
    table.put(0, {0: factors()})
    before = table.cells.clone()

    with pytest.raises(InputError, match=message):
        table.put(0, {1: factors(), 0: (a, bt)})

    assert torch.equal(table.cells, before)


def test_refuses_negative_numbers():
    for slot, at in ((-1, {}), (0, {-1: factors()})):
        with pytest.raises(InputError, match="negative"):
            small().put(slot, at)


def test_a_table_made_in_inference_mode_may_be_written_outside_of_it():
    with torch.inference_mode():
        table = small()

    table.put(0, {0: factors()})
