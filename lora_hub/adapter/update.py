"""`Update`, the normal form of what one adapter does to one linear target.

    Δ = diag(p)·W + W·diag(q) + b·diag(scaling)·a        and a bias that is added

LoRA and rsLoRA have p = q = bias = 0; other methods are exact in the same form. It is
closed under weighted sums: the factors are stacked, p, q and bias add (`composing/`).
`scaling` holds one number for each row of `a`, so that a sum of adapters keeps every
factor's bits and all weights stay float64.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from lora_hub.errors import ComposeError


@dataclass(frozen=True, slots=True, eq=False)
class Update:
    """One target's update.

    Attributes:
        a: (rank, in_features), in the dtype of its file.
        b: (out_features, rank), in the dtype of its file.
        scaling: (rank,), what multiplies each row of `a`.
        p: (out_features,), how much of each row of W is added; None is zero.
        q: (in_features,), how much of each column of W is added; None is zero.
        bias: (out_features,), added to the output; None is zero.
    """

    a: Float[Tensor, "rank inp"]
    b: Float[Tensor, "out rank"]
    scaling: Float64[Tensor, " rank"]
    p: Float64[Tensor, " out"] | None = None
    q: Float64[Tensor, " inp"] | None = None
    bias: Float64[Tensor, " out"] | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features), the shape of the base weight."""
        return self.b.shape[0], self.a.shape[1]

    def scaled(self, weight: float) -> "Update":
        """Return the update times a weight; the factors are shared, not copied.

        Raises:
            ComposeError: a number becomes too large for float64.
        """
        return replace(
            self,
            scaling=_times(self.scaling, weight),
            p=None if self.p is None else _times(self.p, weight),
            q=None if self.q is None else _times(self.q, weight),
            bias=None if self.bias is None else _times(self.bias, weight),
        )


def delta(
    update: Update,
    weight: Float[Tensor, "rows inp"] | None = None,
    *,
    rows: slice = slice(None),
) -> Float64[Tensor, "rows inp"]:
    """Return the dense change of the weight in float64, or some rows of it.

    Args:
        update: what to expand; its bias is no part of the weight's change.
        weight: the same rows of the base weight, needed where p or q is given.
        rows: which rows; all by default.

    Raises:
        ComposeError: p or q is given and the weight is not.
    """
    change = (update.b[rows].double() * update.scaling) @ update.a.double()
    if update.p is None and update.q is None:
        return change
    if weight is None:
        raise ComposeError("the change depends on the base weight, which is not given")
    base = weight.double()
    if update.p is not None:
        change += update.p[rows, None] * base
    if update.q is not None:
        change += base * update.q
    return change


def _times(vector: Float64[Tensor, " n"], weight: float) -> Float64[Tensor, " n"]:
    product = vector * weight
    if not bool(torch.isfinite(product).all()):
        raise ComposeError(
            f"the weight {weight!r} makes a scaling that float64 cannot hold",
            hint="give smaller weights",
        )
    return product
