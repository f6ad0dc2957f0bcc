"""torch tensors ↔ the bytes a safetensors file holds: little-endian, row-major.

One table says which torch dtype each name of the format is. The format itself is read
and written by `tensors/`, without torch.
"""

from collections.abc import Callable
from itertools import accumulate
from operator import mul

import torch
from torch import Tensor

from lora_hub.tensors.file import TensorFile
from lora_hub.tensors.header import TensorInfo

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
    if not data:  # of which torch makes no tensor
        return torch.empty(shape, dtype=TORCH[dtype])
    # A bytearray, because torch warns about memory it must not write to.
    flat = torch.frombuffer(bytearray(data), dtype=TORCH[dtype])
    return flat.reshape(shape)


def one_by_one(file: TensorFile) -> Callable[[TensorInfo], Tensor]:
    """Return what gives the tensors of a file, each in memory of its own."""
    return lambda info: to_tensor(file.read(info.name), info.dtype, info.shape)


def all_at_once(file: TensorFile) -> Callable[[TensorInfo], Tensor]:
    """Return what gives the tensors of a file as views of one copy of all their bytes.

    One copy costs less than hundreds. It lives as long as one of the tensors does.
    """
    copy = memoryview(bytearray(file.whole()))
    whole: dict[torch.dtype, Tensor] = {}

    def tensor(info: TensorInfo) -> Tensor:
        dtype = TORCH[info.dtype]
        size = dtype.itemsize
        if info.begin == info.end or info.begin % size:
            # Numbers have to lie at multiples of their size.
            return to_tensor(copy[info.begin : info.end], info.dtype, info.shape)
        flat = whole.get(dtype)
        if flat is None:
            numbers = copy[: len(copy) // size * size]
            flat = whole[dtype] = torch.frombuffer(numbers, dtype=dtype)
        strides = tuple(accumulate(info.shape[:0:-1], mul, initial=1))[::-1]
        if not info.shape:
            strides = ()
        return flat.as_strided(info.shape, strides, info.begin // size)

    return tensor


def to_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of the tensor; of its own memory where that is laid out right."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
