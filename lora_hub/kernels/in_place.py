"""Small tensors that kernels read at run time, and how they are written in place.

A CUDA graph keeps the addresses and grids it was captured with. So what a swap or another
batch changes lies in tensors that are written in place, each time with one small copy on
the current stream, behind the launches that are queued there. A larger tensor would be
another: a graph would go on reading the old one. So what a capture has read (`captured`)
grows no more; it refuses, and says what to reserve.
"""

import torch
from torch import Tensor

from lora_hub.errors import InputError


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros that may be written to in inference mode and outside of it."""
    with torch.inference_mode(mode=False):
        return torch.zeros(shape, dtype=dtype, device=device)


def write(to: Tensor, values: Tensor) -> None:
    """Copy small values from the CPU in place, behind what the stream has queued."""
    if to.is_cuda:
        # Pinned memory of torch's own is not handed out again before the copy has ended.
        values = values.pin_memory()
    to.copy_(values, non_blocking=True)


def refuse_while_capturing(device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise InputError(
            "a CUDA graph is being captured, and would write the tables at every replay",
            hint="load, swap and say which rows use what before, or between replays",
        )


def refuse_if(refused: bool, problem: str, instead: str) -> None:
    if refused:
        raise InputError(
            f"a captured graph reads {problem}", hint=f"capture again after {instead}"
        )
