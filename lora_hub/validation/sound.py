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
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_hub.formats.source import AdapterSource, UpdateSource
from lora_hub.recent import RecentOfSame
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
    plan = _RECENT.get(source.updates, kind_of)
    if plan is None:
        plan = _plan(source.updates, kind_of)
        _RECENT.keep(source.updates, kind_of, result=plan)
    if not plan.is_plain:
        return False
    norms: list[float] = []
    for group in plan.groups:
        found = _norms(source.tensors, group)
        if found is None:
            return False
        norms += found
    for kind in plan.kinds:
        of_kind = [norms[index] for index in kind]
        if not max(of_kind) < limit_of(of_kind) - margin:
            return False
    return bool(plan.kinds)


@dataclass(frozen=True, slots=True)
class _Group:
    """Updates whose factors are of one dtype and shape.

    Attributes:
        logs: logarithms of the scalings, without their signs.
        steps: how far apart the factors a lie in the file, and the factors b; None where
            not at even distances.
    """

    a: tuple[TensorInfo, ...]
    b: tuple[TensorInfo, ...]
    logs: "NDArray[Any]"
    steps: tuple[int | None, int | None]


@dataclass(frozen=True, slots=True)
class _Plan:
    """All that is known of an adapter before its numbers are.

    Attributes:
        is_plain: whether one can tell in this way at all.
        kinds: for each, where its updates are among those of all groups.
    """

    is_plain: bool
    groups: tuple[_Group, ...] = ()
    kinds: tuple[tuple[int, ...], ...] = ()


_RECENT: RecentOfSame[_Plan] = RecentOfSame()


def _plan(
    updates: Sequence[UpdateSource], kind_of: Callable[[UpdateSource], tuple[object, ...]]
) -> _Plan:
    import numpy as np

    by_shape: dict[tuple[object, ...], list[UpdateSource]] = {}
    for update in updates:
        a, b = update.a, update.b
        if update.layer != "linear" or not 0 < update.rank <= _MAX_RANK:
            return _Plan(is_plain=False)
        if update.rank > min(a.shape[1], b.shape[0]) or not update.scaling:
            return _Plan(is_plain=False)
        by_shape.setdefault((a.dtype, a.shape, b.dtype, b.shape), []).append(update)
    groups: list[_Group] = []
    kinds: dict[tuple[object, ...], list[int]] = {}
    index = 0
    for members in by_shape.values():
        logs = np.log(np.abs([update.scaling for update in members]))
        a_infos = tuple(update.a for update in members)
        b_infos = tuple(update.b for update in members)
        steps = (_step(a_infos), _step(b_infos))
        groups.append(_Group(a_infos, b_infos, logs, steps))
        for update in members:
            kinds.setdefault(kind_of(update), []).append(index)
            index += 1
    return _Plan(True, tuple(groups), tuple(map(tuple, kinds.values())))


def _norms(file: TensorFile, group: _Group) -> list[float] | None:
    """Return the logarithms of ‖scaling·B·A‖, None where an update may not be sound."""
    import numpy as np

    a = _stacked(file, group.a, group.steps[0])
    b = _stacked(file, group.b, group.steps[1])
    with np.errstate(all="ignore"):
        # Of a copy: for one and the same matrix numpy calls another function of BLAS, which
        # takes four times as long at these sizes.
        g = a.copy() @ a.swapaxes(1, 2)
        h = b.swapaxes(1, 2) @ b
        both = np.concatenate([g, h]).astype("f8")
        traces = both.trace(axis1=1, axis2=2)
        # Not the contrary of what is wrong: a NaN is in no range.
        if not ((traces > _LEAST_TRACE) & (traces < _LARGEST_TRACE)).all():
            return None
        if not _has_full_rank(both, traces):
            return None
        squares = (both[: len(a)] * both[len(a) :]).sum(axis=(1, 2))
        if not (squares > 0).all():
            return None
        norms: list[float] = (group.logs + np.log(squares) / 2).tolist()
    return norms


def _has_full_rank(matrices: "NDArray[Any]", traces: "NDArray[Any]") -> bool:
    import numpy as np

    others = matrices.shape[1] - 1
    if not others:
        return True
    signs, logs = np.linalg.slogdet(matrices)
    least = logs - others * np.log(traces / others) - np.log(traces)
    return bool(((signs > 0) & (least > math.log(_LEAST_SHARE))).all())


def _step(infos: Sequence[TensorInfo]) -> int | None:
    """Return the even distance at which tensors lie in the file, None where it is none."""
    starts = [info.begin for info in infos]
    if len(starts) == 1:
        return 0
    step = starts[1] - starts[0]
    is_even = step and starts == list(
        range(starts[0], starts[0] + step * len(starts), step)
    )
    return step if is_even else None


def _stacked(
    file: TensorFile, infos: Sequence[TensorInfo], step: int | None
) -> "NDArray[Any]":
    """Return tensors of one dtype and shape behind each other, as float32 where need be.

    Without a copy where they lie in the file at an even distance, `step`.
    """
    import numpy as np

    first = infos[0]
    if first.dtype != "F32":
        return np.stack(
            [arrays.floats(file.read(i.name), i.dtype, i.shape) for i in infos]
        ).astype("f4", copy=False)
    data = file.whole()
    if step is not None:
        rows, columns = first.shape
        return np.ndarray(
            (len(infos), rows, columns), "<f4", data, first.begin, (step, 4 * columns, 4)
        )
    numbers = [
        np.frombuffer(data, "<f4", first.elements, info.begin).reshape(first.shape)
        for info in infos
    ]
    return np.stack(numbers)
