"""torch tensors ↔ the bytes a safetensors file holds: little-endian, row-major.

One table says which torch dtype each name of the format is. The format itself is read
and written by `tensors/`, without torch.
"""

import torch
from torch import Tensor

# The host is little-endian, as is every machine torch ships wheels for today.
TORCH: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in TORCH.items()}


def to_tensor(data: bytes | memoryview, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """Return a tensor of its own memory that holds a copy of the bytes."""
    # A bytearray, because torch warns about memory it must not write to.
    flat = torch.frombuffer(bytearray(data), dtype=TORCH[dtype])
    return flat.reshape(shape)


def to_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of the tensor; of its own memory where that is laid out right."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
