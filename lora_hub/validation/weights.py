"""Findings about the numbers in an adapter."""

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lora_hub.formats.source import AdapterSource, UpdateSource
from lora_hub.inspect.factors import Figures, figures_of
from lora_hub.recent import RecentOfSame
from lora_hub.tensors import arrays
from lora_hub.tensors.dtypes import is_float
from lora_hub.tensors.header import TensorInfo
from lora_hub.validation.findings import Finding, finding
from lora_hub.validation.sound import is_sound

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# Of 106 published configs all lie between 1/32 and 4.
LEAST_SCALING, MOST_SCALING = 1 / 32, 32.0

# How many median absolute deviations above the median of its kind a log norm may lie. A
# kind of fewer targets has no statistics; where all are alike, the floor stands for the
# deviation, so that an outlier is at least four times the median.
OUTLYING = 6.0
FLOOR = 0.16
FEWEST = 8
_TO_SIGMA = 1.4826  # of a normal distribution

# How far below the limit a log norm in float32 must be to need no second look: it is right
# to some 1e-5, a deviation counts nine times.
_MARGIN = 0.02


def check_numbers(source: AdapterSource) -> list[Finding]:
    """Return findings about the values of all tensors; each is read once.

    Some zero factors b are normal, in layers that never learned.
    """
    # Of sound factors there is nothing to tell.
    figures = None if is_sound(source, _kind, _limit, _MARGIN) else figures_of(source)
    if figures is None and _is_ordinary(source):
        return []
    found: list[Finding] = []
    for update, one in zip(source.updates, figures, strict=True) if figures else ():
        if one.frobenius is None:
            found += _not_finite(source, (update.a, update.b))
    beside = tuple(_beside_factors(source))
    found += _not_finite(source, beside)
    found += _unread(source, beside)
    if figures is not None:
        found += _zeros(source, figures)
    found += _scalings(source)
    if figures is not None:
        found += [*_outliers(source, figures), *_ranks(source, figures)]
    return [*found, *_zero_weights(source)]


_ORDINARY: RecentOfSame[bool] = RecentOfSame()


def _is_ordinary(source: AdapterSource) -> bool:
    """Return whether there is nothing but factors, of scalings as they should be."""
    parts = (source.updates, source.scales, source.replacements)
    known = _ORDINARY.get(*parts)
    if known is None:
        known = not any([*_beside_factors(source), *_scalings(source)])
        _ORDINARY.keep(*parts, result=known)
    return known


def _beside_factors(source: AdapterSource) -> Iterator[TensorInfo]:
    """Give the tensors that are no factors."""
    for update in source.updates:
        yield from (one for one in (update.magnitude, update.bias) if one is not None)
    yield from (scales.vector for scales in source.scales)
    yield from (replaced.tensor for replaced in source.replacements)


def _not_finite(source: AdapterSource, infos: Iterable[TensorInfo]) -> Iterator[Finding]:
    import numpy as np

    for info in infos:
        if info.dtype not in arrays.FLOATS:
            continue
        values = _values(source, info)
        bad = values.size - int(np.isfinite(values).sum())
        if bad:
            yield finding(
                "LH030",
                f"{source.tensors.where}: {info.name}",
                f"{bad} of {values.size} numbers are NaN or infinite",
            )


def _unread(source: AdapterSource, infos: Iterable[TensorInfo]) -> Iterator[Finding]:
    """Say which numbers nobody looked at; integers are always finite."""
    names: dict[str, list[str]] = {}
    for info in infos:
        if is_float(info.dtype) and info.dtype not in arrays.FLOATS:
            names.setdefault(info.dtype, []).append(info.name)
    for dtype, listed in sorted(names.items()):
        yield finding(
            "LH062",
            source.tensors.where,
            f"numbers of {dtype} are not looked at: {_listed(listed)}",
        )


def _zeros(source: AdapterSource, figures: Sequence[Figures]) -> Iterable[Finding]:
    zero = [
        update.target
        for update, one in zip(source.updates, figures, strict=True)
        if one.is_b_zero
    ]
    # Something else acts where b does not.
    acts = source.replacements or any(
        update.magnitude is not None or update.bias is not None for update in source.updates
    )
    if not source.updates or (len(zero) == len(figures) and not acts):
        if not source.updates and not _all_ones(source):
            return
        what = "every factor b is zero" if source.updates else "every scale is one"
        yield finding("LH031", source.tensors.where, f"{what} throughout")
    elif zero:
        yield finding(
            "LH032",
            source.tensors.where,
            f"{len(zero)} of {len(figures)} factors b are zero throughout: {_listed(zero)}",
        )


def _all_ones(source: AdapterSource) -> bool:
    """Return whether scales change nothing; False where there are none, or other parts."""
    known = [one.vector for one in source.scales if one.vector.dtype in arrays.FLOATS]
    if not known or source.replacements or len(known) < len(source.scales):
        return False
    return all(bool((_values(source, vector) == 1).all()) for vector in known)


def _zero_weights(source: AdapterSource) -> Iterator[Finding]:
    """A bias may be zero, a row of an embedding too (padding); a weight never is."""
    import numpy as np

    for replaced in source.replacements:
        tensor = replaced.tensor
        is_weight = len(tensor.shape) > 1 and replaced.rows is None
        if not (is_weight and tensor.elements):
            continue
        if not np.frombuffer(source.tensors.read(tensor.name), dtype="u1").any():
            yield finding(
                "LH063",
                f"{source.tensors.where}: {tensor.name}",
                f"every number that takes the place of {replaced.name} is zero",
            )


def _values(source: AdapterSource, info: TensorInfo) -> "NDArray[np.floating[Any]]":
    return arrays.floats(source.tensors.read(info.name), info.dtype, info.shape)


def _scalings(source: AdapterSource) -> Iterable[Finding]:
    odd: dict[float, list[str]] = {}
    for update in source.updates:
        if not LEAST_SCALING <= update.scaling <= MOST_SCALING:
            odd.setdefault(update.scaling, []).append(update.target)
    for scaling, targets in sorted(odd.items()):
        yield finding(
            "LH033",
            source.tensors.where,
            f"the scaling is {scaling:.4g} for {_listed(targets)}",
        )


def _outliers(source: AdapterSource, figures: Sequence[Figures]) -> Iterable[Finding]:
    kinds: dict[tuple[object, ...], list[tuple[str, float]]] = {}
    for update, one in zip(source.updates, figures, strict=True):
        if one.frobenius:
            kinds.setdefault(_kind(update), []).append((update.target, one.frobenius))
    for group in kinds.values():
        logs = [math.log(norm) for _, norm in group]
        limit = _limit(logs)
        for target, norm in group:
            if math.log(norm) > limit:
                yield finding(
                    "LH034",
                    f"{source.tensors.where}: {target}",
                    f"the norm of its delta is {norm:.4g}, the median of the {len(group)} "
                    f"targets of its kind {math.exp(statistics.median(logs)):.4g}",
                )


def _kind(update: UpdateSource) -> tuple[object, ...]:
    return (update.target.rpartition(".")[2], update.a.shape[1:], update.b.shape[:1])


def _limit(logs: Sequence[float]) -> float:
    """Return the largest log norm in a kind that is no outlier."""
    if len(logs) < FEWEST:
        return math.inf
    middle = statistics.median(logs)
    deviation = statistics.median(abs(value - middle) for value in logs)
    return middle + OUTLYING * _TO_SIGMA * max(deviation, FLOOR)


def _ranks(source: AdapterSource, figures: Sequence[Figures]) -> Iterable[Finding]:
    unused = [
        (update.target, one.used_rank, update.rank)
        for update, one in zip(source.updates, figures, strict=True)
        if one.used_rank is not None and 0 < one.used_rank < _most_rank(update)
    ]
    if unused:
        target, used, rank = min(unused, key=lambda item: item[1] / item[2])
        yield finding(
            "LH035",
            source.tensors.where,
            f"{len(unused)} of {len(figures)} targets use less than their rank; least "
            f"{target}: {used} of {rank}",
        )


def _most_rank(update: UpdateSource) -> int:
    """Return how much of its rank an update can use."""
    inputs = math.prod(update.a.shape[1:])
    return min(update.rank, inputs, update.b.shape[0])


def _listed(targets: Sequence[str]) -> str:
    more = len(targets) - 3
    return ", ".join(targets[:3]) + (f" and {more} more" if more > 0 else "")
