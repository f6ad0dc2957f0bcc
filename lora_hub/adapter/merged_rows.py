"""What weighted adapters make of some rows of one tensor, and the one rounding of it.

Of each part, the layer's weight with this part alone is `M + Δ`, where M is the base's
tensor, or what the part exchanged for it. The result is the base's tensor W plus the
weighted sum of what the parts make of it,

    W + Σ wᵢ·((Mᵢ - W) + Δᵢ)        Δᵢ = diag(p)·Mᵢ + Mᵢ·diag(q) + b·diag(scaling)·a

so no part sees another. Sums are float64, rounded once to float32 (to float64 beside it),
added to W there, and rounded once to the dtype that is kept.

A merge into a checkpoint and one on a live model both go through here, with the same
blocks, so that they give the same bits.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from jaxtyping import Float64, Shaped
from torch import Tensor

from lora_hub.adapter.update import Update, delta

# Elements in memory at a time: 4 MiB in float64, of which a handful exist at once
# (`benchmarks/merge_memory.py`).
BLOCK_ELEMENTS = 1 << 19

# Which of some rows are meant: their numbers, or a slice.
Lines = Tensor | slice


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows of one matrix of a tensor.

    Attributes:
        expert: which matrix, 0 where there is one.
        inside: the rows of that matrix.
        flat: the rows counted through all matrices, as they lie in the file.
    """

    expert: int
    inside: slice
    flat: slice


def cut(count: int, shape: tuple[int, ...], elements: int) -> Iterator[tuple[Rows, int]]:
    """Give the rows of blocks of `count` matrices, and how many columns they have.

    A block has at most so many elements, or is a single row.
    """
    height, columns = (shape[0] if shape else 1), math.prod(shape[1:])
    step = max(1, elements // max(1, columns))
    for expert in range(count):
        for start in range(0, height if columns else 0, step):
            stop = min(start + step, height)
            first = expert * height
            yield (
                Rows(expert, slice(start, stop), slice(first + start, first + stop)),
                columns,
            )


class Scratch:
    """Memory that is used block after block.

    Fresh memory for each block costs as much as the sums: the system gives it in pages,
    each of which is a fault when it is first touched.
    """

    def __init__(self) -> None:
        self._held: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def room(
        self, what: str, like: Shaped[Tensor, "rows columns"], dtype: torch.dtype
    ) -> Shaped[Tensor, "rows columns"]:
        """Return memory for a block of this shape, whose values are not settled.

        It is valid until the same is asked for again.
        """
        key = what, dtype, like.device
        found = self._held.get(key)
        if found is None or found.numel() < like.numel():
            with torch.inference_mode(False):
                found = torch.empty(like.numel(), dtype=dtype, device=like.device)
            self._held[key] = found
        return found[: like.numel()].view(like.shape)


@dataclass(frozen=True, slots=True, eq=False)
class Term:
    """One update as it meets the tensor.

    Attributes:
        part: index of the adapter it is of.
        weight: of that adapter.
        update: what it adds to the adapter's own M.
        is_transposed: whether the tensor holds its matrix as (in, out).
    """

    part: int
    weight: float
    update: Update
    is_transposed: bool = False

    def on(
        self,
        own: Shaped[Tensor, "rows columns"],
        rows: Rows,
        out: Float64[Tensor, "rows columns"] | None = None,
    ) -> Float64[Tensor, "rows columns"]:
        """Return what is added to these rows of the tensor, before the weight.

        Args:
            own: these rows of the part's M.
            rows: which they are.
            out: memory that the result may be put in.
        """
        update, lines = self.update, rows.inside
        if update.a.dim() == 3:
            update = replace(update, a=update.a[rows.expert], b=update.b[rows.expert])
        # Not given where it has no say: it would be widened for nothing.
        is_asked = not update.rank or update.p is not None or update.q is not None
        base = own if is_asked else None
        if not self.is_transposed:
            return delta(update, base, rows=lines, out=out if update.rank else None)
        q = None if update.q is None else update.q[lines]
        turned = replace(update, a=update.a[:, lines], q=q)
        return delta(turned, None if base is None else base.T).T


def change_of(
    terms: Sequence[Term],
    alone: Callable[[int], Shaped[Tensor, "rows columns"]],
    rows: Rows,
    scratch: Scratch | None = None,
) -> Float64[Tensor, "rows columns"] | None:
    """Return `Σ wᵢ·Δᵢ`, None where there is no term.

    Args:
        terms: in the order in which they are added.
        alone: the index of a part → its own M.
        rows: which rows these are.
        scratch: memory for them; fresh memory without.
    """
    change: Tensor | None = None
    for term in terms:
        own = alone(term.part)
        what = "change" if change is None else "one more"
        room = scratch.room(what, own, torch.float64) if scratch else None
        added = term.on(own, rows, room)
        if term.weight != 1:
            added.mul_(term.weight)
        change = added if change is None else change.add_(added)
        del added  # a block less while the next term makes its own
    return change


def exchanged(
    was: Shaped[Tensor, "rows columns"],
    news: Sequence[tuple[float, Lines, Shaped[Tensor, "_ columns"]]],
) -> Shaped[Tensor, "rows columns"]:
    """Return `(1 - Σw)·W + Σ w·W'`, in which a single weight of 1 rounds nothing.

    In float64; `was` itself where nothing is exchanged.

    Args:
        was: W.
        news: for each adapter that exchanges some its weight, which rows, their numbers.
    """
    if not news:
        return was
    rest = torch.ones(len(was), 1, dtype=torch.float64, device=was.device)
    total = torch.zeros(was.shape, dtype=torch.float64, device=was.device)
    for weight, lines, new in news:
        rest[lines] -= weight
        total[lines] += weight * new.double()
    return torch.where(rest == 0, total, total + rest * was)


def with_rows(
    was: Shaped[Tensor, "rows columns"],
    lines: Lines,
    new: Shaped[Tensor, "lines columns"],
) -> Shaped[Tensor, "rows columns"]:
    """Return a part's own M: the rows with its numbers in the place of theirs."""
    own = was.to(torch.promote_types(was.dtype, new.dtype), copy=True)
    own[lines] = new.to(own.dtype)
    return own


def of_bias(update: Update) -> Update:
    """Return what an update does to the layer's bias, seen as a matrix of one column."""
    scale = update.bias_scale
    if update.bias is None:
        width = 0 if scale is None else len(scale)
        return Update(
            torch.zeros(0, 1), torch.zeros(width, 0), torch.zeros(0).double(), scale
        )
    one = torch.ones(1, 1, dtype=torch.float64)
    return Update(one, update.bias[:, None], one[0], scale)


def wide_of(*dtypes: torch.dtype) -> torch.dtype:
    """Return the dtype of the last sum, for a tensor that is read and kept in these."""
    return reduce(torch.promote_types, dtypes, torch.float32)


def summed(
    start: Shaped[Tensor, "rows columns"],
    change: Float64[Tensor, "rows columns"] | None,
    wide: torch.dtype,
    scratch: Scratch | None = None,
) -> Shaped[Tensor, "rows columns"]:
    """Return the rows as they are before the one rounding to the dtype they are kept in.

    Args:
        start: W, or in float64 what was exchanged for it.
        change: what is added in `wide`; None where nothing is, and nothing is converted.
        wide: see `wide_of`.
        scratch: memory for the sum; fresh memory without.
    """
    if change is None:
        return start
    if scratch is None:
        return start.to(wide).add(change.to(wide))
    total = scratch.room("total", start, wide).copy_(start)
    return total.add_(scratch.room("rounded", start, wide).copy_(change))
