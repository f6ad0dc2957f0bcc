"""Weighted sums of updates without any rounding of factors: `linear` and `cat`.

Both stack the factors, `a = [a₁; a₂; …]` and `b = [b₁, b₂, …]`, and put the weights into
the scalings; p, q and bias add. `cat` keeps every source's rows in the order given.
`linear` also joins terms that share their factors bit for bit, so that an adapter minus
itself is exactly zero, and it orders terms by their bytes, so that the order in which
adapters are named has no say in a single bit of the result.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce

import torch
from jaxtyping import Float64
from torch import Tensor

from lora_hub.adapter.tensor_bytes import to_bytes
from lora_hub.adapter.update import Update
from lora_hub.errors import ComposeError

Term = tuple[Update, float]  # an update and its weight


def cat(terms: Sequence[Term]) -> Update:
    """Return Σ wᵢ·Δᵢ; its rank is the sum of the ranks.

    Factors of several dtypes are widened to one that holds them all exactly.

    Raises:
        ComposeError: a weight makes a number that float64 cannot hold.
    """
    updates = [update.scaled(weight) for update, weight in terms]
    return _total(_stacked(updates), updates)


def linear(terms: Sequence[Term]) -> Update:
    """Return Σ wᵢ·Δᵢ; terms of equal factors are joined, those that cancel leave.

    Where no row is left, `a` and `b` are an explicit zero of rank 1.

    Raises:
        ComposeError: a weight makes a number that float64 cannot hold.
    """
    updates = [update.scaled(weight) for update, weight in terms]
    rows = [update for update in _joined(updates) if update.scaling.any()]
    return _total(_stacked(rows) if rows else _zero(updates), updates)


def _joined(updates: list[Update]) -> list[Update]:
    """Return one update for each distinct pair of factors, in order of their bytes."""
    if len(updates) == 1:
        return updates
    groups: dict[bytes, list[Update]] = {}
    for update in _widened(updates):
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
    wide = _widened(updates)
    return Update(
        a=torch.cat([update.a for update in wide]),
        b=torch.cat([update.b for update in wide], dim=1),
        scaling=torch.cat([update.scaling for update in wide]),
    )


def _zero(updates: list[Update]) -> Update:
    like = _widened(updates)[0]
    out_features, in_features = like.shape
    return Update(
        a=like.a.new_zeros((1, in_features)),
        b=like.b.new_zeros((out_features, 1)),
        scaling=torch.ones(1, dtype=torch.float64),
    )


def _total(rows: Update, updates: list[Update]) -> Update:
    """Return `rows` with the sums of p, q and bias; sums that are zero are left out."""
    return replace(
        rows,
        p=_optional_sum([update.p for update in updates]),
        q=_optional_sum([update.q for update in updates]),
        bias=_optional_sum([update.bias for update in updates]),
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
