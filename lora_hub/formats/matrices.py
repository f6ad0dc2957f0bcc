"""`Matrix`: a tensor as bytes, and moving its numbers without changing a bit.

Numbers are raw integers of their width here: a transposition of bfloat16 needs no
bfloat16. Only `values` looks at what they mean.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any

from lora_hub.errors import FormatError
from lora_hub.tensors import arrays
from lora_hub.tensors.dtypes import BITS

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Raw = NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True, slots=True)
class Matrix:
    """A tensor's bytes, row-major and little endian."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes | memoryview

    def transposed(self) -> "Matrix":
        """Return the matrix with its last two axes exchanged, its numbers bit for bit."""
        return self.moved(lambda raw: raw.swapaxes(-1, -2))

    def shaped(self, shape: tuple[int, ...]) -> "Matrix":
        """Return the same bytes under a shape of as many numbers."""
        assert prod(shape) == prod(self.shape)
        return replace(self, shape=shape)

    def rows(self, start: int, stop: int) -> "Matrix":
        """Return a part along the first axis."""
        return self.moved(lambda raw: raw[start:stop])

    def moved(self, move: "Callable[[Raw], Raw]") -> "Matrix":
        """Return what a function makes of the numbers, given as raw integers."""
        return of_raw(self.dtype, move(self.raw()))

    def raw(self) -> "Raw":
        """Return the numbers as unsigned integers of their width.

        Raises:
            FormatError: that is no number of bytes.
        """
        import numpy as np

        width, rest = divmod(BITS[self.dtype], 8)
        if rest:
            raise FormatError(f"numbers of {self.dtype} have no whole bytes to move")
        return np.frombuffer(self.data, dtype=f"<u{width}").reshape(self.shape)

    def values(self) -> "NDArray[np.floating[Any]]":
        """Return the numbers of a floating-point dtype, each of them exact."""
        return arrays.floats(self.data, self.dtype, self.shape)


def of_raw(dtype: str, raw: "Raw") -> Matrix:
    """Return a matrix of raw integers."""
    import numpy as np

    return Matrix(dtype, raw.shape, np.ascontiguousarray(raw).tobytes())


def zeros(dtype: str, shape: tuple[int, ...]) -> Matrix:
    """Return a matrix of zeros, which are bits 0 in every floating-point dtype."""
    return Matrix(dtype, shape, bytes(prod(shape) * BITS[dtype] // 8))


def stacked(parts: Sequence[Matrix], axis: int = 0) -> Matrix:
    """Return matrices of one dtype behind each other along an axis."""
    import numpy as np

    return of_raw(parts[0].dtype, np.concatenate([part.raw() for part in parts], axis))


def parted(whole: Matrix, count: int) -> list[Matrix]:
    """Return equal parts of a matrix along its rows; axes may stand in front."""
    import numpy as np

    return [of_raw(whole.dtype, raw) for raw in np.split(whole.raw(), count, axis=-2)]


def block_diagonal(parts: Sequence[Matrix]) -> Matrix:
    """Return matrices of one dtype along the diagonal of the last two axes, else zeros.

    Axes in front, as of experts, are the same for all.
    """
    import numpy as np

    raws = [part.raw() for part in parts]
    front = raws[0].shape[:-2]
    rows = sum(raw.shape[-2] for raw in raws)
    columns = sum(raw.shape[-1] for raw in raws)
    whole = np.zeros((*front, rows, columns), raws[0].dtype)
    row = column = 0
    for raw in raws:
        end_row, end_column = row + raw.shape[-2], column + raw.shape[-1]
        whole[..., row:end_row, column:end_column] = raw
        row, column = end_row, end_column
    return of_raw(parts[0].dtype, whole)


def split_experts(a: Matrix, b: Matrix, experts: int) -> tuple[Matrix, Matrix]:
    """Return PEFT's factors with one axis of experts in front.

    a (experts*rank, in) → (experts, rank, in), b (out, rank*experts) → (experts, out,
    rank).
    """
    rank = a.shape[0] // experts
    whole_a = a.shaped((experts, rank, a.shape[1]))
    whole_b = b.shaped((b.shape[0], rank, experts)).moved(
        lambda raw: raw.transpose(2, 0, 1)
    )
    return whole_a, whole_b


def join_experts(a: Matrix, b: Matrix) -> tuple[Matrix, Matrix]:
    """Return the factors as PEFT lays them out, from those with an axis of experts."""
    experts, rank, columns = a.shape
    flat_b = b.moved(lambda raw: raw.transpose(1, 2, 0))
    return a.shaped((experts * rank, columns)), flat_b.shaped((b.shape[1], rank * experts))
