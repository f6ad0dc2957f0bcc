"""What adapters add to one linear layer's output: the arithmetic of attaching.

    y = W·x + b₀  becomes  y + b·(a·x) + p⊙(W·x) + W·(q⊙x) + bias

An `Effect` is a forward hook. The layer computes its own output as ever and its weight is
never touched, so taking the hook off is taking the adapter off.
"""

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear

from lora_hub.composing.linear import Term, cat

# Dtypes that torch computes in. A layer stored in another one, such as fp8, gives float32.
_COMPUTES = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})


class Effect:
    """The joint effect of weighted updates on one layer, as a forward hook.

    Computes in the wider of the layer's and the factors' dtypes and gives the dtype the
    layer gives. Weights and scalings are folded into `b` in float32 or wider, so that
    16-bit factors are rounded once. Follows the layer's input from device to device.

    Args:
        terms: updates of this layer's target and their weights, at least one.
        layer: the layer it will act on.
    """

    __slots__ = ("_compute", "_tensors")

    # Not in inference mode, whose tensors could not be used in training afterwards.
    @torch.inference_mode(mode=False)
    def __init__(self, terms: Sequence[Term], layer: nn.Linear) -> None:
        update = cat(terms)
        own = layer.weight.dtype if layer.weight.dtype in _COMPUTES else torch.float32
        self._compute = reduce(torch.promote_types, (update.a.dtype, update.b.dtype), own)
        fold = torch.promote_types(self._compute, torch.float32)
        # To the dtype first: not every device has float64.
        scaling = update.scaling.to(fold).to(update.b.device)
        tensors = {
            "a": update.a,
            "b": update.b.to(fold) * scaling,
            "p": update.p,
            "q": update.q,
            "bias": update.bias,
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
        layer: nn.Linear,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        output: Float[Tensor, "*batch out"],
    ) -> Float[Tensor, "*batch out"]:
        """Return the layer's output with the effect added; called by torch."""
        x: Tensor = args[0] if args else kwargs["input"]
        own = self._on(x.device)
        return self._added(own, layer, x.to(self._compute), output).to(output.dtype)

    def _on(self, device: torch.device) -> Mapping[str, Tensor]:
        if device == self._tensors["a"].device:
            return self._tensors
        with torch.inference_mode(mode=False):
            moved = {name: each.to(device) for name, each in self._tensors.items()}
        if device.type != "meta":  # where shapes alone are tried, and numbers would be lost
            self._tensors = moved
        return moved

    def _added(
        self,
        own: Mapping[str, Tensor],
        layer: nn.Linear,
        x: Float[Tensor, "*batch inp"],
        output: Float[Tensor, "*batch out"],
    ) -> Float[Tensor, "*batch out"]:
        y = output.to(self._compute) + linear(linear(x, own["a"]), own["b"])
        if "p" in own:
            # p scales W·x and not the layer's own bias.
            bias: Tensor | None = layer.bias
            wx = output.to(self._compute)
            y = y + own["p"] * (wx if bias is None else wx - bias)
        if "q" in own:
            y = y + linear(x * own["q"], layer.weight.to(self._compute))
        if "bias" in own:
            y = y + own["bias"]
        return y


def _of_its_own(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.is_inference() else tensor
