"""DoRA once the weight is known: p and the factors from the magnitude and the base.

The new weight is `c ⊙ (M + Δ)` with `c = m / ‖M + Δ‖`, norms over the inputs of each row.
So p is `c - 1` and `b` becomes `c ⊙ b`; the layer's own bias is not scaled. The norm is
that of the unmerged base weight, whatever else acts on it.

Source: Liu et al. 2024, arXiv:2402.09353, equation 5; PEFT 0.21.2, `lora/dora.py`.
"""

from dataclasses import replace

import torch
from jaxtyping import Float64, Shaped
from torch import Tensor

from lora_hub.adapter.update import Update, delta
from lora_hub.errors import FitError

# Elements of the weight that are float64 at a time: 32 MB.
BLOCK_ELEMENTS = 1 << 22


def resolved(
    update: Update, matrix: Shaped[Tensor, "out inp"], *, where: str | None = None
) -> Update:
    """Return the update with p and scaled factors in place of its magnitude.

    An update without a magnitude comes back as it is. Works by blocks of rows in float64;
    the dense change is never whole in memory. `b` becomes float64.

    Args:
        update: of a layer that is no experts'.
        matrix: the base weight as (out, in), on any device; `to_matrix` makes it.
        where: what to call the target in messages.

    Raises:
        FitError: a row of the changed weight is zero, or not finite.
    """
    if update.magnitude is None:
        return update
    return with_norms(update, norms_of(update, matrix), where=where)


def norms_of(update: Update, matrix: Shaped[Tensor, "out inp"]) -> Float64[Tensor, " out"]:
    """Return ‖M + Δ‖ of every row, on the CPU.

    By blocks of rows. The closed form `‖M‖² + 2⟨M, Δ⟩ + ‖Δ‖²` needs no dense change; it was
    measured no faster in float64 (ranks 16, widths 576 and 1536), and it cancels where a
    row nearly vanishes.

    Args:
        update: its factors on the device of the matrix.
        matrix: the base weight as (out, in).
    """
    out, inp = update.shape
    step = max(1, BLOCK_ELEMENTS // max(1, inp))
    blocks = [slice(start, min(start + step, out)) for start in range(0, out, step)]
    norms = [row_norms(update, matrix[rows], rows).cpu() for rows in blocks]
    return torch.cat(norms) if norms else torch.zeros(0, dtype=torch.float64)


def row_norms(
    update: Update, weight: Shaped[Tensor, "rows inp"], rows: slice
) -> Float64[Tensor, " rows"]:
    """Return ‖M + Δ‖ of some rows, for callers that see the weight row by row.

    Args:
        update: its p and q have no say here.
        weight: these rows of the base weight as a matrix.
        rows: which rows.
    """
    plain = replace(update, p=None, q=None, magnitude=None)
    changed = delta(plain, rows=rows).add_(weight)
    norms: Tensor = changed.norm(dim=1)
    return norms


def with_norms(
    update: Update, norms: Float64[Tensor, " out"], *, where: str | None = None
) -> Update:
    """Return `resolved` from the norms of all rows.

    Raises:
        FitError: a norm is zero or not finite.
    """
    if update.magnitude is None:
        return update
    bad = torch.nonzero(~((norms > 0) & norms.isfinite()))
    if len(bad):
        row = int(bad[0])
        raise FitError(
            f"row {row} of the weight with the update has the norm {float(norms[row])}, "
            "which DoRA divides by",
            where=where,
            hint="the base is not the one the adapter was trained on, or is damaged",
        )
    scale = update.magnitude / norms
    return replace(
        update,
        b=update.b.double() * scale.to(update.b.device)[:, None],
        p=scale - 1,
        magnitude=None,
    )
