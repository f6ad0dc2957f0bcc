"""Tensor bytes in a wider dtype → the bytes they were widened from, where that is exact.

A bf16 base loaded as float32 holds the same values in other bytes. Narrowing is exact
where every value survives the way there and back, bit for bit; signed zeros and NaN
payloads count.
"""

from typing import TYPE_CHECKING

from lora_hub.tensors.arrays import NUMPY

if TYPE_CHECKING:
    import numpy as np


def narrow(data: memoryview, dtype: str, to: str) -> memoryview | None:
    """Return the bytes of the same values in the narrower dtype, None where one is lost.

    Args:
        data: whole elements, little endian.
        dtype: F32 or F64, what `data` holds.
        to: a dtype that `dtype` widens: BF16, F16 or F32.
    """
    import numpy as np

    if to != "BF16":
        return _narrow(np.frombuffer(data, dtype=NUMPY[dtype]), NUMPY[to])
    if dtype == "F64":
        single = _narrow(np.frombuffer(data, dtype=NUMPY["F64"]), NUMPY["F32"])
        if single is None:
            return None
        data = single
    # bf16 is the upper half of a float32. One pass over whole words is several times as
    # fast as looking at every other half of them.
    words = np.frombuffer(data, dtype="<u4")
    if np.bitwise_or.reduce(words) & 0xFFFF:
        return None
    halves = np.empty(words.shape, dtype="<u2")
    np.right_shift(words, 16, out=halves, casting="unsafe")
    return halves.view("u1").data


def _narrow(wide: "np.ndarray", to: str) -> memoryview | None:
    import numpy as np

    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        narrow = wide.astype(to)
        back = narrow.astype(wide.dtype)
    word = f"<u{wide.dtype.itemsize}"
    if not np.array_equal(back.view(word), wide.view(word)):
        return None
    return narrow.view("u1").data
