"""The bytes of a tensor as a numpy array, for looking at numbers without torch.

numpy has no bfloat16; its values are exact as float32. What is moved or stored stays
bytes.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# How numpy spells them; it has no bfloat16.
NUMPY = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}

# What `floats` can read.
FLOATS = frozenset({*NUMPY, "BF16"})


def floats(
    data: bytes | memoryview, dtype: str, shape: tuple[int, ...]
) -> "NDArray[np.floating[Any]]":
    """Return the values of a tensor whose dtype is one of `FLOATS`, each of them exact."""
    import numpy as np

    if dtype == "BF16":
        # bf16 is the upper half of a float32.
        wide = np.frombuffer(data, dtype="<u2").astype("<u4") << 16
        return wide.view("<f4").reshape(shape)
    return np.frombuffer(data, dtype=NUMPY[dtype]).reshape(shape)
