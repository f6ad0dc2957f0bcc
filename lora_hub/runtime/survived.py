"""How much of a merged change survived the rounding to the dtype of the weights.

In bfloat16 a weight moves in steps of up to 0.8 % of its size. A change that is smaller
than half a step leaves a weight as it was, or moves it by a whole one, so a merged adapter
is not quite the attached one. What was meant is Δ, what became of it is `W' - W`:

    kept       ⟨W' - W, Δ⟩ / ‖Δ‖²       1 where the change is there in its whole length
    lost       ‖W' - W - Δ‖ / ‖Δ‖       0 where it is exact
    unchanged  the share of numbers that have the bits they had
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Shaped
from torch import Tensor

from lora_hub.adapter.merged_rows import Scratch

SHOWN = 5  # tensors in the table, those that kept least

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class Survived:
    """What became of the change of one tensor, or of all.

    Attributes:
        name: of the tensor.
        dtype: what was rounded to, e.g. bfloat16.
        elements: how many numbers it has.
        unchanged: how many of them have the bits they had.
        along: ⟨W' - W, Δ⟩.
        size: ‖Δ‖².
        missed: ‖W' - W - Δ‖².
    """

    name: str
    dtype: str
    elements: int
    unchanged: int
    along: float
    size: float
    missed: float

    @property
    def kept(self) -> float:
        """How much of the change is there along itself; 1 where nothing was to change."""
        return self.along / self.size if self.size else 1.0

    @property
    def lost(self) -> float:
        """How far the result is from what was meant, of the size of the change."""
        return math.sqrt(self.missed / self.size) if self.size else 0.0

    @property
    def unchanged_share(self) -> float:
        return self.unchanged / self.elements if self.elements else 0.0


@dataclass(frozen=True, slots=True)
class MergedReport:
    """What a merge on a live model did; `str` of it is for people.

    Attributes:
        count: how many tensors were merged into.
        tensors: what became of each change, in the order of merging; none where that was
            not measured.
        host_bytes: what it costs in host memory to be able to take it back.
        kept_in: the folder that the base's numbers are in; None where they are in memory.
        notes: what a person should hear.
    """

    count: int
    tensors: tuple[Survived, ...]
    host_bytes: int
    kept_in: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def total(self) -> Survived:
        """All tensors taken together."""
        dtypes = dict.fromkeys(tensor.dtype for tensor in self.tensors)
        return Survived(
            "in all",
            "/".join(dtypes),
            sum(tensor.elements for tensor in self.tensors),
            sum(tensor.unchanged for tensor in self.tensors),
            math.fsum(tensor.along for tensor in self.tensors),
            math.fsum(tensor.size for tensor in self.tensors),
            math.fsum(tensor.missed for tensor in self.tensors),
        )

    def __str__(self) -> str:
        where = f" and {self.kept_in}" if self.kept_in else ""
        size = f"{self.host_bytes / 1e6:.1f} MB of host memory"
        lines = [f"merged into {self.count} tensors; to take it back: {size}{where}"]
        if self.tensors:
            worst = sorted(self.tensors, key=lambda tensor: tensor.kept)[:SHOWN]
            rows = [self.total, *(worst if len(self.tensors) > 1 else ())]
            width = max(len(row.name) for row in rows)
            lines.append(f"{'':{width}}  {'kept':>7}  {'lost':>7}  {'unchanged':>9}")
            lines += [
                f"{row.name:{width}}  {row.kept:>7.2%}  {row.lost:>7.2%}  "
                f"{row.unchanged_share:>9.2%}  {row.dtype}"
                for row in rows
            ]
        return "\n".join((*lines, *self.notes))


class Tally:
    """Sums over the blocks of one tensor, read once at the end.

    Args:
        scratch: memory for blocks.
    """

    def __init__(self, scratch: Scratch) -> None:
        self._scratch = scratch
        self._unchanged: int | Tensor = 0
        self._sums: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(
        self,
        was: Shaped[Tensor, "rows columns"],
        made: Shaped[Tensor, "rows columns"],
        meant: Shaped[Tensor, "rows columns"],
    ) -> bool:
        """Take a block in; return whether all its numbers are certainly finite.

        Args:
            was: as the base has it.
            made: as it is now, in the same dtype.
            meant: Δ, in float32 or float64; it is not changed.
        """
        room, wide = self._scratch.room, meant.dtype
        block = room("moved", was, wide).copy_(made)
        block.sub_(room("was", was, wide).copy_(was))
        moved, flat = block.view(-1), meant.reshape(-1)
        along, size = torch.dot(moved, flat), torch.dot(flat, flat)
        missed = moved.sub_(flat)
        self._sums.append((along, size, torch.dot(missed, missed)))
        self._unchanged = self._unchanged + _alike(was, made)
        return math.isfinite(self._sums[-1][2])

    def of(self, name: str, tensor: Tensor) -> Survived:
        """Return the sums as what became of the tensor of this name."""
        return Survived(
            name,
            str(tensor.dtype).removeprefix("torch."),
            tensor.numel(),
            int(self._unchanged),
            *self._total(),
        )

    def _total(self) -> Sequence[float]:
        if not self._sums:
            return 0.0, 0.0, 0.0
        blocks = torch.stack([torch.stack(each) for each in self._sums])
        return [math.fsum(column) for column in _columns(blocks.cpu().double())]


def _columns(blocks: Tensor) -> Iterable[list[float]]:
    columns: list[list[float]] = blocks.T.tolist()
    return columns


def _alike(was: Tensor, made: Tensor) -> int | Tensor:
    """Return how many numbers have the same bits."""
    bits = _BITS[was.itemsize]
    one, other = was.view(bits), made.view(bits)
    if not one.is_cpu:
        return one.eq(other).sum()
    import numpy as np

    # 0.15 ns a number, where torch takes 0.5 to compare and more to count (torch 2.13).
    return one.numel() - int(np.count_nonzero(one.numpy() != other.numpy()))
