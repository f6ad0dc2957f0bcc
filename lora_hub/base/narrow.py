"""Tensor bytes in a wider dtype → the bytes they were widened from, where that is exact.

A bf16 base loaded as float32 holds the same values in other bytes. Narrowing is exact
where every value survives the way there and back, bit for bit; signed zeros and NaN
payloads count.
"""

from typing import TYPE_CHECKING

from lora_hub.tensors.arrays import NUMPY

if TYPE_CHECKING:
    import numpy as np


def narrow(data: memoryview, dtype: str, to: str) -> bytes | None:
    """Return the same values in the narrower dtype, or None where one does not survive.

    Args:
        data: whole elements, little endian.
        dtype: F32 or F64, what `data` holds.
        to: a dtype that `dtype` widens: BF16, F16 or F32.
    """
    import numpy as np

    wide = np.frombuffer(data, dtype=NUMPY[dtype])
    if to != "BF16":
        return _narrow(wide, NUMPY[to])
    if dtype == "F64":
        single = _narrow(wide, NUMPY["F32"])
        if single is None:
            return None
        wide = np.frombuffer(single, dtype=NUMPY["F32"])
    # bf16 is the upper half of a float32.
    halves = wide.view("<u2").reshape(-1, 2)
    return None if halves[:, 0].any() else halves[:, 1].tobytes()


def _narrow(wide: "np.ndarray", to: str) -> bytes | None:
    import numpy as np

    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        narrow = wide.astype(to)
        back = narrow.astype(wide.dtype)
    same = back.tobytes() == wide.tobytes()
    return narrow.tobytes() if same else None
