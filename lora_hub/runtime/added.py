"""What an update adds to the output of a layer, one function for each kind of layer.

The layer has computed `y = W·x + b₀` as ever, and

    b·(a·x) + p⊙(W·x) + W·(q⊙x) + bias + bias_scale⊙b₀

is added. Factors are applied one after the other; no dense change is made.
"""

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from lora_hub.manifest.document import Layer

Tensors = Mapping[str, Tensor]  # a, b with the scaling, and those of p, q, … that are given

_CONV = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


def to_linear(
    own: Tensors,
    layer: nn.Module,
    x: Float[Tensor, "*batch inp"],
    y: Float[Tensor, "*batch out"],
) -> Float[Tensor, "*batch out"]:
    """Return y with the update of a linear layer added, GPT-2's Conv1D included."""
    added = torch.zeros_like(y)
    if len(own["a"]):
        added = functional.linear(functional.linear(x, own["a"]), own["b"])
    if "q" in own:
        weight = _own(layer, "weight", y)
        matrix = weight.T if is_conv1d(layer) else weight
        added = added + functional.linear(x * own["q"], matrix)
    return y + _of_rows(own, layer, y, added, 0)


def to_embedding(
    own: Tensors,
    layer: nn.Module,
    x: Int[Tensor, "*batch"],
    y: Float[Tensor, "*batch out"],
) -> Float[Tensor, "*batch out"]:
    """Return y with the update of the rows that x names added.

    A layer that scales what it looks up (`embed_scale`) scales the update, too.
    """
    added = torch.zeros_like(y)
    if len(own["a"]):
        added = functional.linear(functional.embedding(x, own["a"].T), own["b"])
    scale = embed_scale(layer)
    if scale is not None:
        added = added * scale.to(y.dtype)
    if "q" in own:
        added = added + own["q"][x].unsqueeze(-1) * y
    return y + _of_rows(own, layer, y, added, 0)


def to_conv(
    own: Tensors,
    layer: nn.Module,
    x: Float[Tensor, "*batch_and_channels_in"],
    y: Float[Tensor, "*batch_and_channels_out"],
) -> Float[Tensor, "*batch_and_channels_out"]:
    """Return y with the update of a convolution added.

    `a` is a kernel over all channels with the layer's own stride, padding and dilation,
    `b` one of size 1 after it: what the layer gives with the changed weight.
    """
    assert isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    axes = len(layer.kernel_size)
    conv: Callable[..., Tensor] = _CONV[axes]
    padded, padding = _padded(layer, x)
    where: dict[str, Any] = {
        "stride": layer.stride,
        "padding": padding,
        "dilation": layer.dilation,
    }
    added = torch.zeros_like(y)
    if len(own["a"]):
        kernel = own["a"].reshape(-1, layer.in_channels, *layer.kernel_size)
        column = own["b"].reshape(*own["b"].shape, *(1,) * axes)
        added = conv(conv(padded, kernel, **where), column)
    if "q" in own:
        weight = _own(layer, "weight", y) * by_groups(layer, own["q"])
        added = added + conv(padded, weight, groups=layer.groups, **where)
    return y + _of_rows(own, layer, y, added, axes)


ADDED: Mapping[Layer, Callable[[Tensors, nn.Module, Tensor, Tensor], Tensor]] = {
    "linear": to_linear,
    "embedding": to_embedding,
    "conv": to_conv,
}


def is_conv1d(module: nn.Module) -> bool:
    """Return whether it is transformers' Conv1D: a linear layer stored as (in, out)."""
    # By name: nothing here needs transformers, and whoever has such a layer does.
    weight = getattr(module, "weight", None)
    return (
        type(module).__name__ == "Conv1D"
        and hasattr(module, "nf")
        and isinstance(weight, Tensor)
        and weight.dim() == 2
    )


def embed_scale(layer: nn.Module) -> Tensor | None:
    """Return what an embedding multiplies with what it looks up, None where nothing."""
    scale = getattr(layer, "embed_scale", None)
    if scale is None:
        return None
    weight = layer.weight
    assert isinstance(weight, Tensor)
    # In the dtype of the weight first, as the layers that have one do.
    return torch.as_tensor(scale, device=weight.device).to(weight.dtype)


def _of_rows(own: Tensors, layer: nn.Module, y: Tensor, added: Tensor, axes: int) -> Tensor:
    """Return `added` and what p, bias and bias_scale add; channels have `axes` behind."""

    def shaped(vector: Tensor) -> Tensor:
        return vector.reshape(-1, *(1,) * axes)

    scales = "p" in own or "bias_scale" in own
    bias = _own(layer, "bias", y) if scales else None
    if "p" in own:
        # p scales W·x and not the layer's own bias.
        added = added + shaped(own["p"]) * (y if bias is None else y - shaped(bias))
    if "bias" in own:
        added = added + shaped(own["bias"])
    if "bias_scale" in own and bias is not None:
        added = added + shaped(own["bias_scale"] * bias)
    return added


def _own(layer: nn.Module, name: str, like: Tensor) -> Any:
    tensor = getattr(layer, name, None)
    return None if tensor is None else tensor.to(like.dtype)


def _padded(layer: nn.Module, x: Tensor) -> tuple[Tensor, Any]:
    """Return the input and what is left to pad with zeros."""
    assert isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    if layer.padding_mode == "zeros":
        return x, layer.padding
    sides = layer._reversed_padding_repeated_twice  # noqa: SLF001  (as its forward does)
    return functional.pad(x, sides, mode=layer.padding_mode), 0


def by_groups(layer: nn.Module, q: Tensor) -> Tensor:
    """Return q in the shape of the weight: a group's rows see that group's channels."""
    assert isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    if len(q) == layer.in_channels:
        q = q.repeat_interleave(prod(layer.kernel_size))
    groups, each = layer.groups, layer.in_channels // layer.groups
    spread = q.reshape(groups, 1, each, *layer.kernel_size)
    rows = layer.out_channels // groups
    return spread.expand(groups, rows, *spread.shape[2:]).reshape(layer.weight.shape)
