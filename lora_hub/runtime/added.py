"""What an update adds to the output of a layer, one function for each kind of layer.

The layer has computed `y = W·x + b₀` as ever, and a weight times

    b·(a·x) + p⊙(W·x) + W·(q⊙x) + bias + bias_scale⊙b₀

is added to `total`, in place: that may be the output itself, or zeros that all adapters of
these rows add to. Factors are applied one after the other; no dense change is made.
"""

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from lora_hub.manifest.document import Layer
from lora_hub.runtime.quantised import is_packed, numbers_of
from lora_hub.runtime.resident import Factors

_CONV = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


def to_linear(
    own: Factors,
    layer: nn.Module,
    x: Float[Tensor, "*batch inp"],
    y: Float[Tensor, "*batch out"],
    total: Float[Tensor, "*batch out"],
    weight: float,
) -> None:
    """Add the update of a linear layer, GPT-2's Conv1D included."""
    # First, since the output may be what is added to.
    _of_rows(own, layer, y, total, weight, 0)
    x, total = x.reshape(-1, x.shape[-1]), total.view(-1, total.shape[-1])
    if own.rank:
        total.addmm_(torch.mm(x, own.a.T), own.bt, alpha=weight)
    if own.q is not None:
        matrix = _own(layer, "weight", total)
        matrix = matrix if is_conv1d(layer) else matrix.T
        total.addmm_(x * own.q, matrix, alpha=weight)


def to_embedding(
    own: Factors,
    layer: nn.Module,
    x: Int[Tensor, "*batch"],
    y: Float[Tensor, "*batch out"],
    total: Float[Tensor, "*batch out"],
    weight: float,
) -> None:
    """Add the update of the rows that x names.

    A layer that scales what it looks up (`embed_scale`) scales the update, too.
    """
    if own.q is not None:
        total.addcmul_(y, own.q[x].unsqueeze(-1), value=weight)
    _of_rows(own, layer, y, total, weight, 0)
    if own.rank:
        added = functional.embedding(x, own.a.T) @ own.bt
        scale = embed_scale(layer)
        if scale is not None:
            added *= scale.to(added.dtype)
        total.add_(added, alpha=weight)


def to_conv(
    own: Factors,
    layer: nn.Module,
    x: Float[Tensor, "*batch_and_channels_in"],
    y: Float[Tensor, "*batch_and_channels_out"],
    total: Float[Tensor, "*batch_and_channels_out"],
    weight: float,
) -> None:
    """Add the update of a convolution.

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
    _of_rows(own, layer, y, total, weight, axes)
    if own.rank:
        kernel = own.a.reshape(-1, layer.in_channels, *layer.kernel_size)
        column = own.bt.T.reshape(*own.bt.T.shape, *(1,) * axes)
        total.add_(conv(conv(padded, kernel, **where), column), alpha=weight)
    if own.q is not None:
        scaled = _own(layer, "weight", total) * by_groups(layer, own.q)
        total.add_(conv(padded, scaled, groups=layer.groups, **where), alpha=weight)


Added = Callable[[Factors, nn.Module, Tensor, Tensor, Tensor, float], None]

ADDED: Mapping[Layer, Added] = {
    "linear": to_linear,
    "embedding": to_embedding,
    "conv": to_conv,
}


def is_conv1d(module: nn.Module) -> bool:
    """Return whether it is transformers' Conv1D: a linear layer stored as (in, out)."""
    # By name: nothing here needs transformers, and whoever has such a layer does.
    if type(module).__name__ != "Conv1D":
        return False
    weight = getattr(module, "weight", None)
    return hasattr(module, "nf") and isinstance(weight, Tensor) and weight.dim() == 2


def embed_scale(layer: nn.Module) -> Tensor | None:
    """Return what an embedding multiplies with what it looks up, None where nothing."""
    scale = getattr(layer, "embed_scale", None)
    if scale is None:
        return None
    weight = layer.weight
    assert isinstance(weight, Tensor)
    # In the dtype of the weight first, as the layers that have one do.
    return torch.as_tensor(scale, device=weight.device).to(weight.dtype)


def _of_rows(
    own: Factors, layer: nn.Module, y: Tensor, total: Tensor, weight: float, axes: int
) -> None:
    """Add what p, bias and bias_scale do; channels have `axes` behind them."""
    if own.p is None and own.bias is None and own.bias_scale is None:
        return

    def shaped(vector: Tensor) -> Tensor:
        return vector.reshape(-1, *(1,) * axes)

    bias = _own(layer, "bias", total)
    if own.p is not None:
        p = shaped(own.p)
        # p scales W·x and not the layer's own bias.
        total.addcmul_(y if bias is None else y - shaped(bias), p, value=weight)
    if own.bias is not None:
        total.add_(shaped(own.bias), alpha=weight)
    if own.bias_scale is not None and bias is not None:
        total.add_(shaped(own.bias_scale * bias), alpha=weight)


def _own(layer: nn.Module, name: str, like: Tensor) -> Any:
    tensor = getattr(layer, name, None)
    if tensor is not None and is_packed(tensor):
        tensor = numbers_of(tensor, layer)
        assert tensor is not None  # or the adapter would have been refused
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
