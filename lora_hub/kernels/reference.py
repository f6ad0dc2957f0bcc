"""What the grouped product is, in ten lines of torch; the kernels must agree with it."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def add_grouped(
    y: Tensor,
    x: Tensor,
    lists: Sequence[Sequence[tuple[int, float]]],
    factors: Mapping[int, tuple[Tensor, Tensor]],
) -> Tensor:
    """Return y + Σ weight · (x · aᵀ) · bt, summed in float64, over what each row lists.

    Args:
        y: (tokens, out).
        x: (tokens, in); a row's tokens lie side by side.
        lists: for each row its (slot, weight), in any number; tokens is a multiple of rows.
        factors: slot → a (rank, in), bt (rank, out); ranks differ; a slot that is not there
            adds nothing.

    Returns:
        float64 (tokens, out), not rounded.
    """
    result = y.double()
    each = len(x) // len(lists)
    for row, pairs in enumerate(lists):
        rows = slice(row * each, (row + 1) * each)
        for slot, weight in pairs:
            if slot in factors:
                a, bt = (factor.double() for factor in factors[slot])
                result[rows] += weight * (x[rows].to(torch.float64) @ a.T @ bt)
    return result
