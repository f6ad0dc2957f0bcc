"""Layers whose weight is spread over processes: tensor parallelism by torch's DTensor.

Each process has the whole adapter and adds the part that its own output has. What that is
can be read off what the layer is given and gives, and so holds for torch's
`parallelize_module` and for the `tp_plan` of transformers alike:

    given  whole, gives a part of the features   → that part of `b`
    given  a part of the features, gives whole   → that part of `a`; the small product with
                                                   it is summed over the processes, not the
                                                   output
    given  whole, gives whole                    → as on one process
    gives  a part of the tokens                  → those tokens, of what was given or summed

A part is that of `torch.chunk`, as DTensor has it. The processes have to do the same: load
the same adapters in the same order, and use the same ones in each forward.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Float64, Shaped
from torch import Tensor, nn

from lora_hub.adapter.layout import to_matrix
from lora_hub.adapter.resolve import norms_of
from lora_hub.adapter.update import Update
from lora_hub.manifest.document import Layer
from lora_hub.runtime.added import is_conv1d
from lora_hub.runtime.quantised import numbers_of
from lora_hub.runtime.resident import Factors
from lora_hub.runtime.route import Rows
from lora_hub.runtime.shares import Laid, Whole, entering, is_spread, summed


@runtime_checkable
class Part(Protocol):
    """One adapter on some rows of a layer; see `effect.py`."""

    @property
    def own(self) -> Factors: ...
    @property
    def rows(self) -> Rows | None: ...
    def with_own(self, own: Factors) -> "Part": ...


# (part, layer, what it is given, what it gave, the sum to be added to) → nothing
Add = Callable[[Any, nn.Module, Tensor, Tensor, Tensor], None]


def refusal(module: nn.Module, layer: Layer, *, has_q: bool) -> str | None:
    """Return why an update cannot act on a layer that is spread, None where it can."""
    weight: Any = getattr(module, "weight", None)
    if not is_spread(weight):
        return None
    if layer not in ("linear", "embedding") or is_conv1d(module):
        return "is spread over processes, which is known of linear layers and embeddings"
    if has_q:
        return "is spread over processes, and the update scales its inputs"
    if weight.device_mesh.ndim != 1:
        return f"is spread over a mesh of {weight.device_mesh.ndim} axes, expected one"
    (placement,) = weight.placements
    if type(placement).__name__ not in ("Shard", "Replicate"):
        # Among them _StridedShard: several projections in one weight, each one cut.
        return f"is spread over processes as {placement}, expected Shard or Replicate"
    return None


def spread_of(layer: nn.Module) -> "Spread | None":
    """Return how the layer's weight is spread over processes, None where it is not."""
    weight: Any = layer._parameters.get("weight")  # noqa: SLF001  (no parametrization runs)
    if not is_spread(weight):
        return None
    first, last = weight.shape
    is_embedding = isinstance(layer, nn.Embedding)
    out, inp = (last, first) if is_embedding else (first, last)
    return Spread(layer, Whole(weight.device_mesh, inp, out, is_embedding))


@dataclass(frozen=True, slots=True, eq=False)
class Spread:
    """A layer that is spread over the processes of a mesh of one axis."""

    layer: nn.Module
    whole: Whole

    def added(
        self,
        parts: Sequence[Part],
        add: Add,
        x: Shaped[Tensor, "*batch"],
        y: Float[Tensor, "*batch_out"],
        dtype: torch.dtype,
        *,
        where: Callable[[], str],
    ) -> Float[Tensor, "*batch_out"]:
        """Return the layer's output with the effect of all parts, spread as it was.

        Differentiable with regard to x, as the layer is.

        Args:
            parts: beside the layer and in the dtype.
            add: how the effect of a part is added on one process.
            x: what the layer was given: a DTensor, or this process's part of it.
            y: what it gave, likewise.
            dtype: that is computed in.
            where: the layer's path, for messages.

        Raises:
            InputError: which part of the output this process has is not known.
        """
        laid = Laid.of(self.whole, x, y, where)
        xs, ys = laid.x, laid.y.to(dtype)
        xs = xs if self.whole.is_embedding else xs.to(dtype)
        layer = self._beside(parts, laid.outputs)
        total = torch.zeros_like(ys)
        if laid.inputs is None:
            xs = laid.of_tokens(xs)
            for part in parts:
                add(part.with_own(_local(part.own, laid.outputs)), layer, xs, ys, total)
        else:
            for part, t in zip(parts, self._reduced(parts, xs, laid), strict=True):
                own = _local(part.own, laid.outputs)
                # What is left is a layer that is given the product with `a`.
                one = torch.eye(own.rank, dtype=dtype, device=t.device)
                own = replace(own, a=one)
                add(part.with_own(own), layer, laid.of_tokens(t), ys, total)
        return laid.spread_again((ys + total).to(laid.y.dtype))

    def norms(self, update: Update, given: Tensor) -> Float64[Tensor, " out"] | None:
        """Return ‖M + Δ‖ of every row of the whole weight, on the CPU, by all processes.

        Each looks at its own part of the weight; the squares are summed.

        Args:
            update: of the whole layer, on any device.
            given: the layer's weight, a DTensor.

        Returns:
            None where the weight's numbers cannot be had.
        """
        spread: Any = given
        local = numbers_of(spread.to_local(), self.layer)
        if local is None:
            return None
        device = local.device
        kind: Layer = "embedding" if self.whole.is_embedding else "linear"
        matrix = to_matrix(local, kind, is_transposed=self.whole.is_embedding)
        (placement,) = spread.placements
        rows, columns = slice(0, self.whole.out), slice(0, self.whole.inp)
        if placement.is_shard():
            if (placement.dim % 2 == 0) == self.whole.is_embedding:
                columns = self.whole.share(self.whole.inp)
            else:
                rows = self.whole.share(self.whole.out)
        own = replace(
            update,
            a=update.a.to(device)[:, columns],
            b=update.b.to(device)[rows],
            scaling=update.scaling.to(device),
            p=None,
            q=None,
            bias=None,
            bias_scale=None,
            magnitude=None,
        )
        squares = torch.zeros(self.whole.out, dtype=torch.float64)
        squares[rows] = norms_of(own, matrix).square()
        if placement.is_shard():
            squares = summed(self.whole.mesh, squares.to(device)).cpu()
        return squares.sqrt()

    def _reduced(
        self, parts: Sequence[Part], x: Tensor, laid: Laid
    ) -> list[Float[Tensor, "*batch rank"]]:
        """Return for each part x times its `a`, summed over the processes in one go.

        Rows that a part does not act on are not multiplied, and are zero.
        """
        assert laid.inputs is not None
        wheres = [
            slice(None) if part.rows is None else part.rows.of(len(x), x.device)
            for part in parts
        ]
        products = [
            x[where] @ part.own.a[:, laid.inputs].T
            for part, where in zip(parts, wheres, strict=True)
        ]
        # Summed in float32 at least, so that the number of processes rounds nothing more.
        wide = torch.promote_types(x.dtype, torch.float32)
        flat = torch.cat([each.reshape(-1) for each in products]).to(wide)
        flat = summed(self.whole.mesh, flat).to(x.dtype)
        if torch.is_grad_enabled() and (laid.outputs is not None or laid.tokens):
            flat = entering(self.whole.mesh, flat)
        made = []
        sizes = [each.numel() for each in products]
        for part, where, product, t in zip(
            parts, wheres, products, torch.split(flat, sizes), strict=True
        ):
            found = t.view(product.shape)
            if part.rows is not None:
                every = found.new_zeros(*x.shape[:-1], part.own.rank)
                every[where] = found
                found = every
            made.append(found)
        return made

    def _beside(self, parts: Sequence[Part], outputs: slice | None) -> nn.Module:
        """Return a layer that has the bias of these outputs, as a tensor of its own."""
        bias: Any = getattr(self.layer, "bias", None)
        if self.whole.is_embedding or bias is None:
            return self.layer
        beside = nn.Module()
        if any(part.own.p is not None or part.own.bias_scale is not None for part in parts):
            bias = bias.detach()
            whole = bias.full_tensor() if is_spread(bias) else bias
            beside.register_buffer("bias", whole if outputs is None else whole[outputs])
        return beside


def _local(own: Factors, outputs: slice | None) -> Factors:
    """Return the factors of some outputs; views."""
    if outputs is None:
        return own
    vectors: dict[str, Any] = {
        name: vector[outputs]
        for name in ("p", "bias", "bias_scale")
        if (vector := getattr(own, name)) is not None
    }
    return replace(own, bt=own.bt[:, outputs], **vectors)
