"""Quantised layers: which of their tensors are packed, and what numbers those stand for.

An adapter adds to what a layer gives, so a quantised layer computes as ever and its weight
is not looked at. Only what needs the weight's own numbers asks here: DoRA's norms, and
updates that scale inputs. They are the numbers the layer itself computes with, told by the
library that packed them; where there is no such way, the weight has none, and who asks
refuses by name.

Told apart by where their types come from, so that neither torchao nor bitsandbytes is
imported: who has such a layer has imported it. Seen with torchao 0.18 and bitsandbytes
0.50.
"""

import sys
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from lora_hub.runtime.sharing import is_plain

_BITSANDBYTES = ("Params4bit", "Int8Params")


def kind_of(tensor: Tensor) -> str | None:
    """Return what a packed tensor is called, None for one that is its own numbers."""
    name = type(tensor).__name__
    if _library(tensor) == "bitsandbytes" and name in _BITSANDBYTES:
        state = _state(tensor)
        return name if state is None else f"{name} ({state.quant_type})"
    return None if is_plain(tensor) else name


def is_packed(tensor: Tensor) -> bool:
    """Return whether what it stores are not the numbers it stands for."""
    return kind_of(tensor) is not None


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """Return the shape of the numbers it stands for; four bits lie two in a byte."""
    state = _state(tensor)
    return tuple(tensor.shape if state is None else state.shape)


def numbers_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype of the numbers it stands for, the stored one where none is known."""
    state = _state(tensor)
    dtype = tensor.dtype if state is None else state.dtype
    assert isinstance(dtype, torch.dtype)
    return dtype


def dtype_of(tensor: Tensor, module: nn.Module) -> torch.dtype:
    """Return the dtype of the numbers that a module's tensor stands for.

    Of eight bits by bitsandbytes that is not recorded: that of the layer's bias, else the
    stored one, in which nothing is computed.
    """
    bias = getattr(module, "bias", None)
    is_known = tensor.is_floating_point() or _state(tensor) is not None
    return numbers_dtype(tensor) if is_known or bias is None else numbers_dtype(bias)


def numbers_of(tensor: Tensor, module: nn.Module) -> Shaped[Tensor, "..."] | None:
    """Return the numbers that a module computes with, None where there is no way to them.

    A tensor that is not packed comes back as it is, without its gradient. For others the
    numbers are made anew in each call, all of them at once.

    Args:
        tensor: the module's own, or this process's part of it.
        module: what it is of, which may keep scales beside it.
    """
    if not is_packed(tensor):
        return tensor.detach()
    with torch.no_grad():
        return _UNPACK.get(_library(tensor), _none)(module, tensor)


def _library(tensor: Tensor) -> str:
    return type(tensor).__module__.partition(".")[0]


def _state(tensor: Tensor) -> Any:
    """Return what bitsandbytes knows of four bits, None for other tensors."""
    if type(tensor).__name__ != "Params4bit" or _library(tensor) != "bitsandbytes":
        return None
    return getattr(tensor, "quant_state", None)  # None until it is on its device


def _of_torchao(_module: nn.Module, tensor: Any) -> Tensor | None:
    unpack = getattr(type(tensor), "dequantize", Tensor.dequantize)
    if unpack is Tensor.dequantize:  # torch's own, for another kind of tensor
        return None
    found = unpack(tensor)
    return found if isinstance(found, Tensor) else None


def _of_bitsandbytes(module: nn.Module, tensor: Any) -> Tensor | None:
    functional: Any = sys.modules["bitsandbytes"].functional
    found: Tensor
    if type(tensor).__name__ == "Params4bit":
        if tensor.quant_state is None:  # not packed yet: it is so on its way to a device
            return None
        found = functional.dequantize_4bit(tensor.data, tensor.quant_state)
        return found
    # Its layer takes the scales over in the first forward.
    scales = tensor.SCB
    if scales is None:
        scales = getattr(getattr(module, "state", None), "SCB", None)
    if scales is None or tensor.dtype != torch.int8:
        return None
    found = functional.int8_vectorwise_dequant(tensor.data, scales)
    return found


def _none(_module: nn.Module, _tensor: Tensor) -> Tensor | None:
    return None


_UNPACK = {"torchao": _of_torchao, "bitsandbytes": _of_bitsandbytes}
