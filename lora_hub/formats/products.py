"""Products of small matrices, written again as one pair of factors.

LoHa multiplies two low-rank matrices number by number, LoKr multiplies every number of
one matrix with the whole of another. Both results have low rank, and their factors are
products of the given numbers with no sum: computed in float64 from numbers that are
float32 or narrower, each is exact (24 bits and 24 bits make 48, and no product leaves
float64's range). Whether the numbers given are such, is the caller's to see.

Sources: Khatri and Rao 1968 for the rows' product; Van Loan 2000, "The ubiquitous
Kronecker product", for (AC) ⊗ (BD) = (A ⊗ B)(C ⊗ D).
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from lora_hub.errors import FormatError
from lora_hub.formats.matrices import Matrix

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.floating[Any]]
    Wide = NDArray[np.float64]
    Pair = tuple[Array, Array]

# What all computed factors of one adapter may take. A product may be as much larger than
# its parts as its author likes: 4 MB of LoKr can stand for 16 GB.
MAX_BYTES = 4 << 30


def khatri_rao(a1: "Array", b1: "Array", a2: "Array", b2: "Array") -> "tuple[Wide, Wide]":
    """Return a and b with `b @ a = (b1 @ a1) * (b2 @ a2)`, number by number.

    Row i*r2 + j of `a` is row i of `a1` times row j of `a2`, and so are the columns of
    `b`.

    Args:
        a1: (r1, in).
        b1: (out, r1).
        a2: (r2, in).
        b2: (out, r2).

    Returns:
        a (r1*r2, in) and b (out, r1*r2) in float64.
    """
    wide_a1, wide_b1, wide_a2, wide_b2 = (_wide(array) for array in (a1, b1, a2, b2))
    a = wide_a1[:, None, :] * wide_a2[None, :, :]
    b = wide_b1[:, :, None] * wide_b2[:, None, :]
    return a.reshape(-1, a.shape[-1]), b.reshape(b.shape[0], -1)


def kronecker(w1: "Array", w2: "Array") -> "Wide":
    """Return w1 ⊗ w2 in float64.

    Number [i*m2 + k, j*n2 + l] is `w1[i, j] * w2[k, l]`.

    Args:
        w1: (m1, n1).
        w2: (m2, n2).

    Returns:
        (m1*m2, n1*n2).
    """
    (m1, n1), (m2, n2) = w1.shape, w2.shape
    whole = _wide(w1)[:, None, :, None] * _wide(w2)[None, :, None, :]
    return whole.reshape(m1 * m2, n1 * n2)


def kronecker_factors(w1: "Pair | Array", w2: "Pair | Array") -> "tuple[Wide, Wide]":
    """Return a and b with `b @ a = w1 ⊗ w2`.

    (B₁A₁) ⊗ (B₂A₂) = (B₁ ⊗ B₂)(A₁ ⊗ A₂). A whole matrix W is taken as I·W or W·I,
    whichever has the lower rank, so nothing is summed here either.

    Args:
        w1: a whole matrix (m1, n1), or its factors: b (m1, r1), then a (r1, n1).
        w2: likewise (m2, n2).

    Returns:
        a (r, n1*n2) and b (m1*m2, r) in float64, where r is the product of the two ranks.
    """
    b1, a1 = w1 if isinstance(w1, tuple) else _split(w1)
    b2, a2 = w2 if isinstance(w2, tuple) else _split(w2)
    return kronecker(a1, a2), kronecker(b1, b2)


def check_size(shapes: Iterable[tuple[int, int, int]], where: str) -> None:
    """Raise `FormatError` if factors for these (out, in, rank) would take too much."""
    total = sum((out + inp) * rank * 8 for out, inp, rank in shapes)
    if total > MAX_BYTES:
        raise FormatError(
            f"as low-rank factors this adapter takes {total / 1e9:.1f} GB, at most "
            f"{MAX_BYTES / 1e9:.1f} GB are computed",
            where=where,
            hint="merge it into the base with PEFT (merge_and_unload)",
        )


def stored(a: "Wide", b: "Wide") -> tuple[Matrix, Matrix]:
    """Return both factors' bytes: in float32 if every number is one, else in float64."""
    import numpy as np

    with np.errstate(over="ignore"):
        narrow = [array.astype(np.float32) for array in (a, b)]
    is_exact = np.array_equal(narrow[0], a) and np.array_equal(narrow[1], b)
    dtype, numpy_dtype = ("F32", "<f4") if is_exact else ("F64", "<f8")
    first, second = (
        Matrix(dtype, array.shape, np.ascontiguousarray(array, numpy_dtype).tobytes())
        for array in (a, b)
    )
    return first, second


def _split(whole: "Array") -> "Pair":
    import numpy as np

    rows, columns = whole.shape
    if rows <= columns:
        return np.eye(rows, dtype=np.float32), whole
    return whole, np.eye(columns, dtype=np.float32)


def _wide(array: "Array") -> "Wide":
    import numpy as np

    return np.asarray(array, dtype=np.float64)
