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
    Term,
    change_of,
    cut,
    exchanged,
    rounded,
    wide_of,
    with_rows,
)
from lora_hub.errors import ComposeError
from lora_hub.runtime.changed import Changed, Exchange
from lora_hub.runtime.survived import Survived, Tally

# Beside a GPU, so that starting its work costs less than the work.
BLOCK_ELEMENTS_FAR = 1 << 25


def write(changed: Changed, into: Tensor) -> Survived:
    """Write what becomes of a tensor, and return how much of that survived rounding.

    Args:
        changed: the tensor as it is, and what becomes of it.
        into: the tensor itself, or another of its shape and dtype.

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
    wide, tally = wide_of(own.dtype), Tally()
    for rows, columns in cut(*matrices, elements):
        flat = (-1, columns)
        was = _block(own, rows, is_one_of_many=are_experts).reshape(flat).to(device)
        news = [
            (each, *_new(each, rows, columns, is_one_of_many=are_experts, device=device))
            for each in changed.exchanges
        ]
        made, meant = _made(was, news, terms, rows, wide)
        if not tally.add(was, made, meant):
            _check_finite(was, made, changed.name)
        block = _block(into.detach(), rows, is_one_of_many=are_experts)
        block.copy_(made.view(block.shape))
    return tally.of(changed.name, into)


def _made(
    was: Shaped[Tensor, "rows columns"],
    news: Sequence[tuple[Exchange, Lines, Tensor]],
    terms: Sequence[Term],
    rows: Rows,
    wide: torch.dtype,
) -> tuple[Shaped[Tensor, "rows columns"], Shaped[Tensor, "rows columns"]]:
    """Return what becomes of the rows, and by how much they were meant to change."""
    if not was.is_floating_point():  # replaced as a whole, which sums would round
        ((_, _, new),) = news
        made = new.to(was.dtype)
        return made, made.to(wide) - was.to(wide)

    def alone(part: int) -> Tensor:
        own = was
        for exchange, lines, new in news:
            if exchange.part == part:
                own = with_rows(own, lines, new)
        return own

    change = change_of(terms, alone, rows)
    start = exchanged(was, [(each.weight, lines, new) for each, lines, new in news])
    made = rounded(start, change, wide, was.dtype)
    if start is was and change is not None:
        return made, change.to(wide)
    exact = start if change is None else start + change
    return made, (exact - was).to(wide)


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
