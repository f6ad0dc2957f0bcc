"""Weighted sums of updates without any rounding of factors: `linear` and `cat`.

Both stack the factors, `a = [a₁; a₂; …]` and `b = [b₁, b₂, …]`, and put the weights into
the scalings; p, q and biases add. `cat` keeps every source's rows in the order given.
`linear` also joins terms that share their factors bit for bit, so that an adapter minus
itself is exactly zero, and it orders terms by their bytes, so that the order in which
adapters are named has no say in a single bit of the result.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from itertools import accumulate

import torch
from jaxtyping import Float64
from torch import Tensor

from lora_hub.adapter.tensor_bytes import to_bytes
from lora_hub.adapter.update import Update, check_resolved, columns_of
from lora_hub.errors import ComposeError

Term = tuple[Update, float]  # an update and its weight


def cat(terms: Sequence[Term]) -> Update:
    """Return Σ wᵢ·Δᵢ; its rank is the sum of the ranks.

    Factors of several dtypes are widened to one that holds them all exactly.

    Raises:
        ComposeError: a weight makes a number that float64 cannot hold; or a magnitude
            (DoRA) is not alone with weight 1.
    """
    updates = _scaled(terms)
    return _total(_stacked(updates), updates)


def linear(terms: Sequence[Term]) -> Update:
    """Return Σ wᵢ·Δᵢ; terms of equal factors are joined, those that cancel leave.

    Where no row is left, `a` and `b` are an explicit zero of rank 1; of rank 0 where no
    term has factors.

    Raises:
        ComposeError: as `cat`.
    """
    updates = _scaled(terms)
    rows = [
        update
        for update in _joined(updates)
        # DoRA without a change is still the base with other norms.
        if update.scaling.any() or update.magnitude is not None
    ]
    return _total(_stacked(rows) if rows else _zero(updates), updates)


def _scaled(terms: Sequence[Term]) -> list[Update]:
    if len(terms) > 1:
        for update, _ in terms:
            check_resolved(update)
    return [update.scaled(weight) for update, weight in terms]


def _joined(updates: list[Update]) -> list[Update]:
    """Return one update for each distinct pair of factors, in order of their bytes."""
    if len(updates) == 1:
        return updates
    groups: dict[bytes, list[Update]] = {}
    for update in _widened(updates):
        if not update.rank:
            continue
        key = hashlib.sha256(to_bytes(update.a))
        key.update(to_bytes(update.b))  # the shape of b follows from those of a and Δ
        groups.setdefault(key.digest(), []).append(update)
    return [
        replace(group[0], scaling=_exact_sum([update.scaling for update in group]))
        for _, group in sorted(groups.items())
    ]


def _stacked(updates: list[Update]) -> Update:
    if len(updates) == 1:
        return updates[0]
    held = [update for update in updates if update.rank]
    if not held:
        return _zero(updates)
    wide = _widened(held)
    rows = _by_groups(wide)
    return replace(
        wide[0],
        a=torch.cat([update.a for update in wide], dim=-2)[..., rows, :],
        b=torch.cat([update.b for update in wide], dim=-1)[..., rows],
        scaling=torch.cat([update.scaling for update in wide])[rows],
    )


def _by_groups(updates: list[Update]) -> slice | Tensor:
    """Return the order of stacked rows in which each group's are side by side.

    So `b`, block-diagonal in a convolution of several groups, stays so.
    """
    groups = updates[0].groups
    if groups == 1:
        return slice(None)
    starts = [0, *accumulate(update.rank for update in updates)]
    blocks = [
        torch.arange(start, start + update.rank).chunk(groups)
        for start, update in zip(starts, updates, strict=False)
    ]
    return torch.cat([block[group] for group in range(groups) for block in blocks])


def _zero(updates: list[Update]) -> Update:
    """Return a zero of rank 1; where none has factors, rank 0 and all that is known.

    A convolution's rank is at least the number of its groups.
    """
    held = [update for update in updates if update.rank]
    like = _widened(held or updates)[0]
    rank = like.groups if held else 0
    *front, out = like.b.shape[:-1]
    inp = like.a.shape[-1]
    if not held:
        out = max(update.shape[0] for update in updates)
        inp = max(update.shape[1] for update in updates)
    return replace(
        like,
        a=like.a.new_zeros((*front, rank, inp)),
        b=like.b.new_zeros((*front, out, rank)),
        scaling=torch.ones(rank, dtype=torch.float64),
        p=None,
        q=None,
        bias=None,
        bias_scale=None,
    )


def _total(rows: Update, updates: list[Update]) -> Update:
    """Return `rows` with the sums of p, q and biases; sums that are zero are left out."""
    columns = rows.shape[-1]
    return replace(
        rows,
        p=_optional_sum([update.p for update in updates]),
        q=_optional_sum(
            [None if each.q is None else columns_of(each.q, columns) for each in updates]
        ),
        bias=_optional_sum([update.bias for update in updates]),
        bias_scale=_optional_sum([update.bias_scale for update in updates]),
    )


def _widened(updates: list[Update]) -> list[Update]:
    a = reduce(torch.promote_types, (update.a.dtype for update in updates))
    b = reduce(torch.promote_types, (update.b.dtype for update in updates))
    return [replace(update, a=update.a.to(a), b=update.b.to(b)) for update in updates]


def _optional_sum(vectors: list[Tensor | None]) -> Float64[Tensor, " n"] | None:
    given = [vector for vector in vectors if vector is not None]
    total = _exact_sum(given) if given else None
    return total if total is not None and total.any() else None


def _exact_sum(vectors: list[Tensor]) -> Float64[Tensor, " n"]:
    """Return the sum, each entry rounded once, so that the order has no say."""
    if len(vectors) == 1:
        return vectors[0]
    columns = zip(*(vector.tolist() for vector in vectors), strict=True)
    try:
        return torch.tensor([math.fsum(column) for column in columns], dtype=torch.float64)
    except OverflowError as error:
        raise ComposeError(
            "the weights add up to a scaling that float64 cannot hold",
            hint="give smaller weights",
        ) from error
