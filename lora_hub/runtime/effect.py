"""What adapters add to one layer's output, as a forward hook.

The layer computes its own output as ever and its weight is never touched, so taking the
hook off is taking the adapter off. The arithmetic of each kind of layer stands in
`added.py`; this file decides the dtype, folds the weights in and follows the input.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora_hub.adapter.tensor_bytes import TORCH
from lora_hub.composing.linear import Term, cat
from lora_hub.runtime.added import ADDED
from lora_hub.tensors.arrays import FLOATS

# Dtypes that torch computes in. A layer stored in another one, such as fp8, gives float32.
COMPUTES = frozenset(TORCH[name] for name in FLOATS)

# From the output of the layer to which of its rows are adapted, as a mask that broadcasts.
Gate = Callable[[Tensor], Tensor]


class Effect:
    """The joint effect of weighted updates on one layer, as a forward hook.

    Computes in the wider of the layer's and the factors' dtypes and gives the dtype the
    layer gives. Weights and scalings are folded into `b` in float32 or wider, so that
    16-bit factors are rounded once. Follows the layer's input from device to device.

    Args:
        terms: updates of this layer's target and their weights, at least one; resolved.
        layer: the layer it will act on.
        dtype: of the factors as they were trained, where that is not what they are in.
        gate: where to act; everywhere without.
    """

    __slots__ = ("_added", "_compute", "_gate", "_tensors")

    # Not in inference mode, whose tensors could not be used in training afterwards.
    @torch.inference_mode(False)
    def __init__(
        self,
        terms: Sequence[Term],
        layer: nn.Module,
        *,
        dtype: torch.dtype | None = None,
        gate: Gate | None = None,
    ) -> None:
        update = cat(terms)
        weight = layer.weight
        assert isinstance(weight, Tensor)
        own = weight.dtype if weight.dtype in COMPUTES else torch.float32
        trained = dtype or torch.promote_types(update.a.dtype, update.b.dtype)
        if not update.rank:  # no factors, whose dtype would count
            trained = own
        self._compute = torch.promote_types(own, trained)
        self._added = ADDED[update.layer]
        self._gate = gate
        fold = torch.promote_types(self._compute, torch.float32)
        # To the dtype first: not every device has float64.
        scaling = update.scaling.to(fold).to(update.b.device)
        tensors = {
            "a": update.a,
            "b": update.b.to(fold) * scaling,
            "p": update.p,
            "q": update.q,
            "bias": update.bias,
            "bias_scale": update.bias_scale,
        }
        self._tensors = {
            name: _of_its_own(tensor.to(self._compute).to(update.a.device))
            for name, tensor in tensors.items()
            if tensor is not None
        }

    @property
    def is_finite(self) -> bool:
        """Whether the dtype that is computed in can hold every number."""
        return all(bool(each.isfinite().all()) for each in self._tensors.values())

    def __call__(
        self,
        layer: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        output: Float[Tensor, "*batch"],
    ) -> Float[Tensor, "*batch"]:
        """Return the layer's output with the effect added; called by torch."""
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        own = self._on(x.device)
        x = x.to(self._compute) if x.is_floating_point() else x
        y = self._added(own, layer, x, output.to(self._compute)).to(output.dtype)
        return y if self._gate is None else torch.where(self._gate(output), y, output)

    def _on(self, device: torch.device) -> Mapping[str, Tensor]:
        if device == self._tensors["a"].device:
            return self._tensors
        with torch.inference_mode(False):
            moved = {name: each.to(device) for name, each in self._tensors.items()}
        if device.type != "meta":  # where shapes alone are tried, and numbers would be lost
            self._tensors = moved
        return moved


def _of_its_own(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.is_inference() else tensor
