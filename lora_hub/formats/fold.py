"""A factor times a number, rounded once; and a factor of more ranks, which is exact.

The product is computed in float64, which holds that of a bfloat16, a float16 or a float32
and a number of 24 bits as it is, and rounded to the nearest number of the factor's dtype.
"""

from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING

from lora_hub.formats.matrices import Matrix
from lora_hub.tensors.arrays import NUMPY, floats
from lora_hub.tensors.dtypes import BITS

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# Half a unit in the last place of float64: what the ratio, and the product, may be off.
_FLOAT64 = 2.0**-52

# The smallest number with all its bits: below it, errors are counted in parts of it.
NORMAL = {"BF16": 2.0**-126, "F16": 2.0**-14, "F32": 2.0**-126, "F64": 2.0**-1022}


def is_power_of_two(ratio: Fraction) -> bool:
    """Return whether a float times this keeps its digits (0 and -2 count too)."""
    return all(
        number & (number - 1) == 0 for number in (abs(ratio.numerator), ratio.denominator)
    )


def times(matrix: Matrix, ratio: Fraction) -> tuple[Matrix, float] | None:
    """Return the matrix times a number, and the largest relative error of an element.

    Errors of elements below the dtype's smallest normal number are relative to that.
    NaN and infinities stay what they are.

    Returns:
        0.0 as the error where every product is exact; None where one is too large for
        the dtype.
    """
    import numpy as np

    before = matrix.values().astype("<f8")
    with np.errstate(all="ignore"):
        exact = before * float(ratio)
        data = _rounded(exact, matrix.dtype)
        after = floats(data, matrix.dtype, matrix.shape).astype("<f8")
        is_finite = np.isfinite(before)
        if not np.isfinite(after[is_finite]).all():
            return None
        near = np.maximum(np.abs(exact), NORMAL[matrix.dtype])
        error = float(np.max((np.abs(after - exact) / near)[is_finite], initial=0.0))
    if not is_power_of_two(ratio):
        error += _FLOAT64
    return replace(matrix, data=data), error


def _rounded(values: "NDArray[np.float64]", dtype: str) -> bytes:
    import numpy as np

    if dtype != "BF16":
        return values.astype(NUMPY[dtype]).tobytes()
    # To the nearest number with 8 significant bits, ties to even, while still in float64:
    # rounding to float32 on the way would be a second rounding.
    bits = values.astype("<f8").view("<u8")
    even = (bits >> np.uint64(45)) & np.uint64(1)
    up = (bits + np.uint64((1 << 44) - 1) + even) & ~np.uint64((1 << 45) - 1)
    near = np.where(np.isfinite(values), up.view("<f8"), values).astype("<f4")
    return (near.view("<u4") >> 16).astype("<u2").tobytes()


def padded(matrix: Matrix, rank: int, axis: int) -> Matrix:
    """Return a matrix with zeros behind, so that its axis (0 or 1) is `rank` long."""
    import numpy as np

    more = [(0, 0), (0, 0)]
    more[axis] = (0, rank - matrix.shape[axis])
    # All bits 0 is the number 0 in every floating-point dtype.
    return matrix.moved(lambda raw: np.pad(raw, more)) if more[axis][1] else matrix


def zeros(dtype: str, shape: tuple[int, int]) -> Matrix:
    return Matrix(dtype, shape, bytes(shape[0] * shape[1] * BITS[dtype] // 8))
