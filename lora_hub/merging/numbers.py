"""The numbers of one merged tensor, some rows at a time, as files hold them.

`adapter/merged_rows.py` says what becomes of some rows; here they are read. DoRA's norms
are those of a part's own weight. They are taken in a first pass over the tensor; the second
gives the sums. Both see a block of the file's rows, which for a transposed weight are
columns of the matrix.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float64, Shaped
from torch import Tensor

from lora_hub.adapter.load import load_scale, load_update
from lora_hub.adapter.merged_rows import (
    BLOCK_ELEMENTS,
    Rows,
    Term,
    change_of,
    cut,
    exchanged,
    of_bias,
    with_rows,
)
from lora_hub.adapter.resolve import with_norms
from lora_hub.adapter.tensor_bytes import TORCH, to_tensor
from lora_hub.adapter.update import Update
from lora_hub.formats.source import UpdateSource
from lora_hub.merging.changes import Change, Exchange, Fate
from lora_hub.merging.planned import Part
from lora_hub.tensors.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True)
class Block:
    """What becomes of some rows.

    Attributes:
        base: as the base has them, in its dtype; zeros for a new tensor.
        start: with what was exchanged, in float64; `base` itself where nothing was.
        change: what is added, None where nothing is.
    """

    base: Shaped[Tensor, "rows columns"]
    start: Shaped[Tensor, "rows columns"]
    change: Float64[Tensor, "rows columns"] | None


Load = Callable[[Change], Update]


def loader(parts: Sequence[Part]) -> Load:
    """Return what loads the update of a change: (out, in), or all experts of its tensor.

    The last two of each part stay in memory, since experts that are stored one by one ask
    for the same two again and again.
    """
    kept: dict[tuple[int, str], Update] = {}

    def load(change: Change) -> Update:
        key = (change.part, change.source.target)
        if key not in kept:
            while len(kept) >= 2 * len(parts):
                kept.pop(next(iter(kept)))
            file, source = parts[change.part].source.tensors, change.source
            kept[key] = (
                load_update(file, source)
                if isinstance(source, UpdateSource)
                else load_scale(file, source)
            )
        update = kept[key]
        if change.aspect == "bias":
            return of_bias(update)
        if change.expert is None:
            return update
        lines = slice(None) if change.rows is None else slice(*change.rows)
        return replace(update, a=update.a[change.expert], b=update.b[change.expert, lines])

    return load


def blocks(
    fate: Fate,
    shape: tuple[int, ...],
    dtype: str,
    base: Checkpoint,
    parts: Sequence[Part],
    load: Load,
) -> Iterator[Block]:
    """Give what becomes of a tensor, block by block in the order of the file.

    Args:
        fate: what happens to it.
        shape: of the tensor.
        dtype: in the base; of a new tensor, in the adapter.
        base: open.
        parts: the adapters.
        load: see `loader`.

    Raises:
        FitError: DoRA meets a row of the weight that is zero.
    """
    held = _Held(fate, dtype, base, parts)
    terms = [
        Term(change.part, parts[change.part].weight, load(change), change.is_transposed)
        for change in fate.changes
    ]
    are_experts = any(term.update.a.dim() == 3 for term in terms)
    matrices = (shape[0], shape[1:]) if are_experts else (1, shape)
    terms = _resolved(terms, held, matrices)
    for rows, columns in cut(*matrices, BLOCK_ELEMENTS):
        was = held.base(rows, columns)
        alone = partial(held.alone, was=was, rows=rows)
        change = change_of(terms, alone, rows)
        yield Block(was, held.exchanged(was, rows), change)


def plain_blocks(
    name: str, shape: tuple[int, ...], dtype: str, base: Checkpoint
) -> Iterator[Shaped[Tensor, "rows columns"]]:
    """Give the rows of a tensor as the base has them."""
    held = _Held(Fate(name, name), dtype, base, ())
    for rows, columns in cut(1, shape, BLOCK_ELEMENTS):
        yield held.base(rows, columns)


@dataclass(frozen=True, slots=True)
class _Held:
    """Rows of one tensor as the base and as the adapters hold them."""

    fate: Fate
    dtype: str
    checkpoint: Checkpoint
    parts: Sequence[Part]

    def base(self, rows: Rows, columns: int) -> Shaped[Tensor, "rows columns"]:
        count = rows.flat.stop - rows.flat.start
        if self.fate.base is None:
            return torch.zeros(count, columns, dtype=TORCH[self.dtype])
        width = columns * TORCH[self.dtype].itemsize
        span = (rows.flat.start * width, rows.flat.stop * width)
        data = self.checkpoint.read(self.fate.base, *span)
        return to_tensor(data, self.dtype, (count, columns))

    def exchanged(
        self, was: Shaped[Tensor, "rows columns"], rows: Rows
    ) -> Shaped[Tensor, "rows columns"]:
        """Return the rows with what was exchanged."""
        return exchanged(
            was,
            [
                (self.parts[each.part].weight, *self._new(each, rows, was.shape[1]))
                for each in self.fate.exchanges
            ],
        )

    def alone(
        self, part: int, was: Shaped[Tensor, "rows columns"], rows: Rows
    ) -> Shaped[Tensor, "rows columns"]:
        """Return the rows as one part by itself has them before its updates."""
        for exchange in self.fate.exchanges:
            if exchange.part == part:
                lines, new = self._new(exchange, rows, was.shape[1])
                was = with_rows(was, lines, new)
        return was

    def _new(
        self, exchange: Exchange, rows: Rows, columns: int
    ) -> tuple[Tensor | slice, Shaped[Tensor, "lines columns"]]:
        """Return which of the rows a part brings, and their numbers."""
        info, file = exchange.source.tensor, self.parts[exchange.part].source.tensors
        size = TORCH[info.dtype].itemsize
        first, last = rows.flat.start, rows.flat.stop
        if exchange.source.rows is None:
            start = (exchange.start + first * columns) * size
            stop = (exchange.start + last * columns) * size
            data = file.read(info.name, start, stop)
            return slice(None), to_tensor(data, info.dtype, (last - first, columns))
        here = [
            (row - first, index)
            for index, row in enumerate(exchange.source.rows)
            if first <= row < last
        ]
        if not here:
            return slice(0, 0), torch.zeros(0, columns)
        width = columns * size
        found = b"".join(
            file.read(info.name, index * width, (index + 1) * width) for _, index in here
        )
        lines = torch.tensor([line for line, _ in here], dtype=torch.int64)
        return lines, to_tensor(found, info.dtype, (len(here), columns))


def _resolved(
    terms: list[Term], held: _Held, matrices: tuple[int, tuple[int, ...]]
) -> list[Term]:
    """Return the terms with p and scaled factors in the place of magnitudes."""
    if all(term.update.magnitude is None for term in terms):
        return terms
    targets = [change.source.target for change in held.fate.changes]
    squares: dict[int, Tensor] = {}
    plain: list[tuple[int, Term]] = []
    for index, term in enumerate(terms):
        magnitude = term.update.magnitude
        if magnitude is not None:
            squares[index] = torch.zeros_like(magnitude)
            bare = replace(term.update, magnitude=None, p=None, q=None)
            plain.append((index, replace(term, update=bare)))
    for rows, columns in cut(*matrices, BLOCK_ELEMENTS):
        was = held.base(rows, columns)
        for index, term in plain:
            own = held.alone(term.part, was, rows)
            square = term.on(own, rows).add_(own).square_()
            if term.is_transposed:
                squares[index] += square.sum(dim=0)
            else:
                squares[index][rows.inside] = square.sum(dim=1)
    return [
        replace(term, update=with_norms(term.update, squares[index].sqrt(), where=target))
        if index in squares
        else term
        for index, (term, target) in enumerate(zip(terms, targets, strict=True))
    ]
