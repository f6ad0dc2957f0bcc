"""The bytes of a GGUF file and what lies in them, through the `gguf` package.

That the counts and lengths in it are true, `gguf_bounds.py` has seen before.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from lora_hub.errors import FormatError
from lora_hub.formats.matrices import Matrix
from lora_hub.tensors.dtypes import BITS

# What llama.cpp multiplies by; it has no kernels for float64.
DTYPES = ("BF16", "F16", "F32")


def contents(
    library: ModuleType, data: bytes, where: str
) -> tuple[dict[str, Any], dict[str, Matrix]]:
    """Return the file's fields and its tensors; nothing of it stays mapped.

    Raises:
        FormatError: it is no GGUF file, or holds a tensor in another dtype.
    """
    named = {
        library.GGMLQuantizationType.F32: "F32",
        library.GGMLQuantizationType.F16: "F16",
        library.GGMLQuantizationType.BF16: "BF16",
    }
    tensors = {}
    with tempfile.TemporaryDirectory() as folder:
        # The package reads files only, and maps them: so it is given a copy of its own.
        path = Path(folder) / "adapter.gguf"
        path.write_bytes(data)
        try:
            reader = library.GGUFReader(path)
            fields = {name: field.contents() for name, field in reader.fields.items()}
            for tensor in reader.tensors:
                dtype = named.get(tensor.tensor_type)
                if dtype is None:
                    raise FormatError(
                        f"{tensor.name} is {tensor.tensor_type.name}; expected one of "
                        f"{', '.join(DTYPES)}",
                        where=where,
                        hint="quantised factors have lost what they were",
                    )
                # GGUF counts the axes from the other end.
                shape = tuple(int(size) for size in reversed(tensor.shape.tolist()))
                tensors[tensor.name] = Matrix(dtype, shape, tensor.data.tobytes())
        except (ValueError, LookupError, TypeError, ArithmeticError) as error:
            raise FormatError(
                f"is no GGUF file that can be read: {error}",
                where=where,
                hint="the download or copy was cut off, or the file is of another version",
            ) from error
    return fields, tensors


def encode(
    library: ModuleType, architecture: str, alpha: float, tensors: Mapping[str, Matrix]
) -> bytes:
    """Return the file of an adapter."""
    import numpy as np

    writer = library.GGUFWriter(None, architecture)
    writer.add_type(library.GGUFType.ADAPTER)
    writer.add_string(library.Keys.Adapter.TYPE, "lora")
    writer.add_float32(library.Keys.Adapter.LORA_ALPHA, alpha)
    for name in sorted(tensors):
        whole = tensors[name]
        # As bytes, with the dtype beside them: numpy has no bfloat16.
        width = whole.shape[-1] * BITS[whole.dtype] // 8
        flat = np.frombuffer(whole.data, dtype="u1").reshape(*whole.shape[:-1], width)
        writer.add_tensor(name, flat, raw_dtype=library.GGMLQuantizationType[whole.dtype])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.gguf"
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()
