"""The dtypes that a safetensors header can name, and how many bits an element takes.

The list is that of safetensors 0.8.0. What the numbers mean is the matter of the tensor
half; packaging moves them as bytes.
"""

BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2": 8,
    "F8_E5M2FNUZ": 8,
    "F8_E8M0": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "C64": 64,
}


def is_float(dtype: str) -> bool:
    """Return whether elements are real floating-point numbers of any width."""
    return dtype.startswith(("F", "BF"))
