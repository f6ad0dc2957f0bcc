"""Write what becomes of one tensor into it, some rows at a time.

Rows are read, summed and rounded as in a merge into a checkpoint
(`adapter/merged_rows.py`), then written where they were. Beside the tensor, a few blocks
are in memory.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Shaped
from torch import Tensor

from lora_hub.adapter.merged_rows import (
    BLOCK_ELEMENTS,
    Lines,
    Rows,
    Scratch,
    Term,
    change_of,
    cut,
    exchanged,
    summed,
    wide_of,
    with_rows,
)
from lora_hub.errors import ComposeError
from lora_hub.runtime.changed import Changed, Exchange
from lora_hub.runtime.survived import Survived, Tally

# Beside a GPU, so that starting its work costs less than the work.
BLOCK_ELEMENTS_FAR = 1 << 25


def write(
    changed: Changed, into: Tensor, scratch: Scratch, *, measure: bool = True
) -> Survived | None:
    """Write what becomes of a tensor, and return how much of that survived rounding.

    Args:
        changed: the tensor as it is, and what becomes of it.
        into: the tensor itself, or another of its shape and dtype.
        scratch: memory for blocks.
        measure: whether to find that out, which takes about as long as the rest; None is
            returned without.

    Raises:
        ComposeError: a number is not finite in its dtype, and was in the base.
    """
    own = changed.tensor.detach()
    # Float64 is to be had on most devices; the others get the sums from the CPU.
    device = torch.device("cpu") if own.device.type == "mps" else own.device
    terms = [_beside(term, device) for term in changed.terms]
    are_experts = any(term.update.a.dim() == 3 for term in terms)
    shape = tuple(own.shape)
    matrices = (shape[0], shape[1:]) if are_experts else (1, shape)
    elements = BLOCK_ELEMENTS if own.is_cpu else BLOCK_ELEMENTS_FAR
    wide, tally = wide_of(own.dtype), Tally(scratch)
    for rows, columns in cut(*matrices, elements):
        flat = (-1, columns)
        was = _block(own, rows, is_one_of_many=are_experts).reshape(flat).to(device)
        news = [
            (each, *_new(each, rows, columns, is_one_of_many=are_experts, device=device))
            for each in changed.exchanges
        ]
        start, change = _made(was, news, terms, rows, scratch)
        total = summed(start, change, wide, scratch)
        if measure:
            total = scratch.room("made", was, own.dtype).copy_(total)
            is_finite = tally.add(was, total, _meant(was, start, change, wide, scratch))
        else:
            is_finite = _fits(total, own.dtype)
        if not is_finite:
            _check_finite(was, total.to(own.dtype), changed.name)
        block = _block(into.detach(), rows, is_one_of_many=are_experts)
        block.copy_(total.view(block.shape))  # rounds, where that is still to be done
    return tally.of(changed.name, into) if measure else None


def _made(
    was: Shaped[Tensor, "rows columns"],
    news: Sequence[tuple[Exchange, Lines, Tensor]],
    terms: Sequence[Term],
    rows: Rows,
    scratch: Scratch,
) -> tuple[Shaped[Tensor, "rows columns"], Shaped[Tensor, "rows columns"] | None]:
    """Return what is exchanged for the rows, or they themselves; and what is added."""
    if not was.is_floating_point():  # replaced as a whole, which sums would round
        ((_, _, new),) = news
        return new.to(was.dtype), None

    def alone(part: int) -> Tensor:
        own = was
        for exchange, lines, new in news:
            if exchange.part == part:
                own = with_rows(own, lines, new)
        return own

    change = change_of(terms, alone, rows, scratch)
    return exchanged(was, [(each.weight, lines, new) for each, lines, new in news]), change


def _meant(
    was: Shaped[Tensor, "rows columns"],
    start: Shaped[Tensor, "rows columns"],
    change: Shaped[Tensor, "rows columns"] | None,
    wide: torch.dtype,
    scratch: Scratch,
) -> Shaped[Tensor, "rows columns"]:
    """Return by how much the rows were meant to change."""
    if change is not None and start is was:
        return scratch.room("meant", was, wide).copy_(change)
    exact = start if change is None else start + change
    return exact.to(torch.promote_types(exact.dtype, wide)).sub(was).to(wide)


def _fits(total: Shaped[Tensor, "rows columns"], dtype: torch.dtype) -> bool:
    """Return whether all numbers certainly are finite in the dtype."""
    if not dtype.is_floating_point:
        return True
    least, most = total.aminmax()
    limit = torch.finfo(dtype).max
    return -limit <= float(least) and float(most) <= limit


def _block(tensor: Tensor, rows: Rows, *, is_one_of_many: bool) -> Tensor:
    """Return these rows, a view of the tensor's memory."""
    if is_one_of_many:
        return tensor[rows.expert][rows.inside]
    return (tensor if tensor.dim() else tensor[None])[rows.inside]


def _new(
    exchange: Exchange,
    rows: Rows,
    columns: int,
    *,
    is_one_of_many: bool,
    device: torch.device,
) -> tuple[Lines, Shaped[Tensor, "lines columns"]]:
    """Return which of the rows an adapter brings, and their numbers."""
    new = exchange.replaced
    if new.rows is None:
        block = _block(new.tensor, rows, is_one_of_many=is_one_of_many)
        return slice(None), block.reshape(-1, columns).to(device)
    assert not is_one_of_many  # rows are those of an embedding or of its head
    first, last = rows.inside.start, rows.inside.stop
    here = [(row - first, n) for n, row in enumerate(new.rows) if first <= row < last]
    lines = torch.tensor([line for line, _ in here], dtype=torch.int64, device=device)
    numbers = new.tensor[[n for _, n in here]].reshape(-1, columns)
    return lines, numbers.to(device)


def _beside(term: Term, device: torch.device) -> Term:
    """Return the term with its factors on the device, widened once for all blocks."""
    update = term.update
    a, b = update.a.to(device).double(), update.b.to(device).double()
    return replace(term, update=replace(update, a=a, b=b))


def _check_finite(was: Tensor, made: Tensor, name: str) -> None:
    if bool((was.isfinite() & ~made.isfinite()).any()):
        raise ComposeError(
            f"the result holds numbers that are not finite in {made.dtype}",
            where=name,
            hint="give smaller weights; `lorahub validate` finds NaN in adapters",
        )
