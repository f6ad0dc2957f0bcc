"""Are an adapter's factors so plainly in order that nothing about them needs telling?

Looking exactly, as `inspect/factors.py` does, takes longer than hashing the file. Most
adapters are far from everything that `weights.py` tells of, which shows in float32 and
without any eigenvalue: with G = A·Aᵀ, H = Bᵀ·B and r rows,

    finite      every number of G and H is
    full rank   the least eigenvalue of G is at least det G · ((r-1) / tr G)^(r-1), since
                the others have at most the mean of the trace; likewise H
    no outlier  ‖B·A‖² = sum(G ∘ H)

each by a margin that float32 cannot eat. A no is no finding: then one looks exactly.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lora_hub.formats.source import AdapterSource, UpdateSource
from lora_hub.tensors import arrays
from lora_hub.tensors.file import TensorFile
from lora_hub.tensors.header import TensorInfo

if TYPE_CHECKING:
    from numpy.typing import NDArray

# The least share of the trace that an eigenvalue of a sound Gram matrix has. In float32 one
# is right to some 1e-5 of the trace; a rank counts as used above 1e-12 of it.
_LEAST_SHARE = 1e-3

# Larger squares, and sums of them, come near what float32 holds.
_LARGEST_TRACE = 1e18
_LEAST_TRACE = 1e-18

# Above this rank the determinants take longer than they save.
_MAX_RANK = 256


def is_sound(
    source: AdapterSource,
    kind_of: Callable[[UpdateSource], tuple[object, ...]],
    limit_of: Callable[[Sequence[float]], float],
    margin: float,
) -> bool:
    """Return whether all factors are finite, of full rank and of a norm like their kind's.

    Args:
        source: the adapter; all of its updates must be of linear layers.
        kind_of: which updates are of one kind.
        limit_of: logarithms of the norms of one kind → the largest that is no outlier.
        margin: how far below that limit a logarithm must be.
    """
    groups: dict[tuple[object, ...], list[UpdateSource]] = {}
    for update in source.updates:
        a, b = update.a, update.b
        if update.layer != "linear" or not 0 < update.rank <= _MAX_RANK:
            return False
        if update.rank > min(a.shape[1], b.shape[0]) or not update.scaling:
            return False
        groups.setdefault((a.dtype, a.shape, b.dtype, b.shape), []).append(update)
    kinds: dict[tuple[object, ...], list[float]] = {}
    for updates in groups.values():
        squares = _squares(source.tensors, updates)
        if squares is None:
            return False
        for update, square in zip(updates, squares, strict=True):
            norm = math.log(abs(update.scaling)) + math.log(square) / 2
            kinds.setdefault(kind_of(update), []).append(norm)
    return bool(kinds) and all(
        max(norms) < limit_of(norms) - margin for norms in kinds.values()
    )


def _squares(file: TensorFile, updates: Sequence[UpdateSource]) -> list[float] | None:
    """Return ‖B·A‖² of updates of one shape, None where one may not be sound."""
    import numpy as np

    a = _stacked(file, [update.a for update in updates])
    b = _stacked(file, [update.b for update in updates])
    with np.errstate(all="ignore"):
        # Of a copy: for one and the same matrix numpy calls another function of BLAS, which
        # takes four times as long at these sizes.
        g = a.copy() @ a.swapaxes(1, 2)
        h = b.swapaxes(1, 2) @ b
        both = np.concatenate([g, h]).astype("f8")
        traces = np.trace(both, axis1=1, axis2=2)
        # Not the contrary of what is wrong: a NaN is in no range.
        if not ((traces > _LEAST_TRACE) & (traces < _LARGEST_TRACE)).all():
            return None
        if not _has_full_rank(both, traces):
            return None
        squared = (both[: len(updates)] * both[len(updates) :]).sum(axis=(1, 2))
    found: list[float] = squared.tolist()
    return found if min(found) > 0 else None


def _has_full_rank(matrices: "NDArray[Any]", traces: "NDArray[Any]") -> bool:
    import numpy as np

    others = matrices.shape[1] - 1
    if not others:
        return True
    signs, logs = np.linalg.slogdet(matrices)
    least = logs - others * np.log(traces / others) - np.log(traces)
    return bool(((signs > 0) & (least > math.log(_LEAST_SHARE))).all())


def _stacked(file: TensorFile, infos: Sequence[TensorInfo]) -> "NDArray[Any]":
    """Return tensors of one dtype and shape behind each other, as float32 where need be.

    Without a copy where they lie in the file at even distances.
    """
    import numpy as np

    first = infos[0]
    if first.dtype != "F32":
        return np.stack(
            [arrays.floats(file.read(i.name), i.dtype, i.shape) for i in infos]
        ).astype("f4", copy=False)
    data = file.whole()
    starts = [info.begin for info in infos]
    step = starts[1] - starts[0] if len(starts) > 1 else 0
    if starts == list(range(starts[0], starts[0] + step * len(starts), step or 1)):
        rows, columns = first.shape
        return np.ndarray(
            (len(infos), rows, columns), "<f4", data, starts[0], (step, 4 * columns, 4)
        )
    numbers = [
        np.frombuffer(data, "<f4", first.elements, info.begin).reshape(first.shape)
        for info in infos
    ]
    return np.stack(numbers)
