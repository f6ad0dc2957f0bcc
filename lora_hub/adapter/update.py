"""`Update`, the normal form of what one adapter does to one target.

    Δ = diag(p)·W + W·diag(q) + b·diag(scaling)·a        and a bias that is added

W is the weight as a matrix (out, in): the transpose of what an embedding stores, and of
what GPT-2's Conv1D does; a convolution's kernel with its inputs in one axis; one matrix
for each expert (`layout.py`).

LoRA and rsLoRA have p = q = bias = 0; other methods are exact in the same form. It is
closed under weighted sums: the factors are stacked, p, q and bias add (`composing/`).
`scaling` holds one number for each row of `a`, so that a sum of adapters keeps every
factor's bits and all weights stay float64.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Float64, Shaped
from torch import Tensor

from lora_hub.errors import ComposeError
from lora_hub.manifest.document import Layer


@dataclass(frozen=True, slots=True, eq=False)
class Update:
    """One target's update.

    Experts have one more axis in front of `a` and `b`. A convolution's in_features are its
    input channels (of all groups) times the size of its kernel, in the order of its weight.
    Rank 0 is an update without factors: p, q, biases alone; a side of which nothing is
    known is then 0 wide, and a convolution's q may have one number for each channel.

    Attributes:
        a: (rank, in_features), in the dtype of its file.
        b: (out_features, rank), in the dtype of its file.
        scaling: (rank,), what multiplies each row of `a`.
        p: (out_features,), how much of each row of W is added; None is zero.
        q: (in_features,), how much of each column of W is added; None is zero.
        bias: (out_features,), added to the output; None is zero.
        bias_scale: (out_features,), how much of the layer's own bias is added; None is
            zero. A p that scales what the layer gives (IA3) has the same numbers here, one
            that scales its weight alone (DoRA) has none.
        layer: what kind of layer it is for.
        kernel: the size of a convolution's kernel, one to three numbers; else empty.
        groups: of a convolution: `b` is block-diagonal, and `a` sees all channels.
        magnitude: (out_features,), DoRA's m: p and the factors are known only when the
            weight is (`resolve.py`). None where it is no DoRA, or was resolved.
    """

    a: Float[Tensor, "*experts rank inp"]
    b: Float[Tensor, "*experts out rank"]
    scaling: Float64[Tensor, " rank"]
    p: Float64[Tensor, " out"] | None = None
    q: Float64[Tensor, " inp"] | None = None
    bias: Float64[Tensor, " out"] | None = None
    layer: Layer = "linear"
    kernel: tuple[int, ...] = ()
    magnitude: Float64[Tensor, " out"] | None = None
    bias_scale: Float64[Tensor, " out"] | None = None
    groups: int = 1

    @property
    def rank(self) -> int:
        return self.a.shape[-2]

    @property
    def shape(self) -> tuple[int, ...]:
        """(out_features, in_features), behind the number of experts where there are.

        With rank 0, a side of which nothing is known is 0.
        """
        return *self.b.shape[:-1], self.a.shape[-1]

    def scaled(self, weight: float) -> "Update":
        """Return the update times a weight; the factors are shared, not copied.

        Raises:
            ComposeError: a number becomes too large for float64; or the weight is not 1
                and the update has a magnitude, which is no linear term.
        """
        if self.magnitude is not None:
            if weight == 1:
                return self
            check_resolved(self)
        return replace(
            self,
            scaling=_times(self.scaling, weight),
            p=None if self.p is None else _times(self.p, weight),
            q=None if self.q is None else _times(self.q, weight),
            bias=None if self.bias is None else _times(self.bias, weight),
            bias_scale=None if self.bias_scale is None else _times(self.bias_scale, weight),
        )


def delta(
    update: Update,
    weight: Shaped[Tensor, "*experts rows inp"] | None = None,
    *,
    rows: slice = slice(None),
    out: Float64[Tensor, "*experts rows inp"] | None = None,
) -> Float64[Tensor, "*experts rows inp"]:
    """Return the dense change of the weight in float64, or some rows of it.

    Args:
        update: what to expand; its biases are no part of the weight's change. Experts all
            at once; for one, give it the factors of that one.
        weight: the same rows of the base weight as a matrix, needed where p or q is given
            and where the rank is 0.
        rows: which rows; all by default.
        out: memory for the result, where there are factors.

    Raises:
        ComposeError: the change depends on the weight, which is not given; or the update
            has a magnitude that was not resolved.
    """
    check_resolved(update)
    if weight is None and (update.p is not None or update.q is not None):
        raise ComposeError("the change depends on the base weight, which is not given")
    if update.rank or weight is None:
        b = update.b[..., rows, :].double() * update.scaling.to(update.b.device)
        change = torch.matmul(b, update.a.double(), out=out)
    else:
        change = torch.zeros_like(weight, dtype=torch.float64)
    if weight is None:
        return change
    base = weight.double()
    if update.p is not None:
        change += update.p[rows, None].to(base.device) * base
    if update.q is not None:
        change += base * columns_of(update.q, base.shape[-1]).to(base.device)
    return change


def columns_of(q: Float64[Tensor, " n"], columns: int) -> Float64[Tensor, " columns"]:
    """Return q with one number for each column where it has one for each channel."""
    return q if len(q) == columns else q.repeat_interleave(columns // len(q))


def check_resolved(update: Update) -> None:
    """Refuse a magnitude where numbers are needed.

    Raises:
        ComposeError: the update has one.
    """
    if update.magnitude is not None:
        raise ComposeError(
            "a DoRA update is known only with the base's weight, which is not at hand",
            hint="attach the adapters together, or merge them into the base together",
        )


def _times(vector: Float64[Tensor, " n"], weight: float) -> Float64[Tensor, " n"]:
    product = vector * weight
    if not bool(torch.isfinite(product).all()):
        raise ComposeError(
            f"the weight {weight!r} makes a scaling that float64 cannot hold",
            hint="give smaller weights",
        )
    return product
