"""`RowLists`: what the kernels read at run time of a batch, its rows and their adapters.

    row → its first and last entry; entry → slot and weight

A row tells where its entries begin and where they end, not only where they begin: rows of
the same set share its entries, and one set for all rows takes as much room as for one. All
of it is one tensor and written with one copy (`in_place.py`). It belongs to one stream, and
to one thread: each thread that routes its own batches has its own.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_hub.errors import InputError
from lora_hub.kernels.in_place import refuse_if, refuse_while_capturing, write, zeros


class RowLists:
    """Which (slot, weight) pairs each row of a batch uses.

    Args:
        rows: how many rows fit; `entries`: how many pairs, rows of one set counted once.
        per_row: the most pairs of one row; with a table's `max_rank` it sizes what lies
            between the launches.
        width: sizes it instead, where it is known which ranks any row's adapters have
            together, at most; then the table may grow between two launches.
    """

    def __init__(
        self,
        device: torch.device | str,
        *,
        rows: int = 64,
        entries: int = 256,
        per_row: int = 4,
        width: int | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.per_row = per_row
        self.width = width
        self.captured = False
        self.count = 1  # rows of the batch
        self.most_slot = -1
        self._lay(rows, entries)

    def write(self, lists: Sequence[Sequence[tuple[int, float]]]) -> None:
        """Give each row of a batch its pairs, in place of those before; none is a bare row.

        One copy of 8 bytes a row and a pair that fit.

        Raises:
            InputError: there is no row, a weight is not finite in float32, a slot is
                negative, or a captured graph reads this and the batch has not as many rows
                as it was captured with, or does not fit.
        """
        if not lists:
            raise InputError("a batch has no row")
        refuse_if(
            self.captured and len(lists) != self.count,
            f"{self.count} rows, where {len(lists)} are given",
            "another RowLists for another batch",
        )
        self._put(lists, len(lists), range(len(lists)))

    def write_all(self, pairs: Sequence[tuple[int, float]], *, rows: int = 1) -> None:
        """Give every row the same pairs; as one row, where any number of tokens will do.

        What a graph was captured with keeps its number of rows.
        """
        rows = self.count if self.captured else rows
        self._put([pairs], rows, [0] * rows)

    def _put(
        self, lists: Sequence[Sequence[tuple[int, float]]], rows: int, of: Sequence[int]
    ) -> None:
        refuse_while_capturing(self.device)
        begins: dict[tuple[tuple[int, float], ...], int] = {}
        slots: list[int] = []
        weights: list[float] = []
        spans = []
        for number in of:
            pairs = tuple(lists[number])
            begin = begins.get(pairs)
            if begin is None:
                begin = begins[pairs] = len(slots)
                for slot, weight in pairs:
                    _check_pair(slot, weight)
                    slots.append(slot)
                    weights.append(weight)
            spans.append((begin, begin + len(pairs)))
        self._reserve(rows, len(slots), max(end - begin for begin, end in spans))
        values = torch.zeros_like(self._all, device="cpu")
        first, last, slot_part, weight_part = _parts(values, self._rows, self._entries)
        span = torch.tensor(spans, dtype=torch.int32)
        first[:rows], last[:rows] = span[:, 0], span[:, 1]
        slot_part[: len(slots)] = torch.tensor(slots, dtype=torch.int32)
        weight_part[: len(slots)] = torch.tensor(weights, dtype=torch.float32)
        write(self._all, values)
        self.count = rows
        self.most_slot = max(slots, default=-1)

    def _reserve(self, rows: int, entries: int, per_row: int) -> None:
        grows = rows > self._rows or entries > self._entries
        if grows or per_row > self.per_row:
            refuse_if(
                self.captured,
                f"room for {self._rows} rows, {self._entries} pairs and {self.per_row}"
                f" of one row, where {rows}, {entries} and {per_row} are needed",
                "larger RowLists",
            )
        self.per_row = max(self.per_row, per_row)
        if grows:
            self._lay(max(rows, self._rows), max(entries, self._entries))

    def _lay(self, rows: int, entries: int) -> None:
        # Whole 16 bytes, so that every part begins at an address Triton compiles for.
        self._rows, self._entries = (-(-number // 4) * 4 for number in (rows, entries))
        size = 2 * (self._rows + self._entries)
        self._all = zeros((size,), torch.int32, self.device)
        parts = _parts(self._all, self._rows, self._entries)
        self.first, self.last, self.slot, self.weight = parts


def _parts(values: Tensor, rows: int, entries: int) -> tuple[Tensor, ...]:
    """Return first and last (rows,), slot (entries,) int32, weight (entries,) float32."""
    first, last, slot, weight = torch.split(values, [rows, rows, entries, entries])
    return first, last, slot, weight.view(torch.float32)


def _check_pair(slot: int, weight: float) -> None:
    if slot < 0:
        raise InputError(f"slot {slot} is negative")
    if not abs(weight) <= torch.finfo(torch.float32).max:
        raise InputError(f"the weight {weight} is no finite number in float32")
