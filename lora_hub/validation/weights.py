"""Findings about the numbers in an adapter."""

import math
import statistics
from collections.abc import Iterable, Sequence

from lora_hub.formats.source import AdapterSource, UpdateSource
from lora_hub.inspect.factors import Figures, figures_of
from lora_hub.tensors import arrays
from lora_hub.validation.findings import Finding, finding

# Of 106 published configs all lie between 1/32 and 4.
LEAST_SCALING, MOST_SCALING = 1 / 32, 32.0

# How many median absolute deviations above the median of its kind a log norm may lie. A
# kind of fewer targets has no statistics; where all are alike, the floor stands for the
# deviation, so that an outlier is at least four times the median.
OUTLYING = 6.0
FLOOR = 0.16
FEWEST = 8
_TO_SIGMA = 1.4826  # of a normal distribution


def check_numbers(source: AdapterSource) -> list[Finding]:
    """Return findings about the values of the factors; each is read once.

    Some zero factors b are normal, in layers that never learned.
    """
    figures = figures_of(source)
    found: list[Finding] = []
    for update, one in zip(source.updates, figures, strict=True):
        if one.frobenius is None:
            found += _not_finite(source, update)
    found += _zeros(source, figures)
    found += _scalings(source)
    found += _outliers(source, figures)
    return [*found, *_ranks(source, figures)]


def _not_finite(source: AdapterSource, update: UpdateSource) -> Iterable[Finding]:
    import numpy as np

    for info in (update.a, update.b):
        data = source.tensors.read(info.name)
        values = arrays.floats(data, info.dtype, info.shape)
        bad = values.size - int(np.isfinite(values).sum())
        if bad:
            yield finding(
                "LH030",
                f"{source.tensors.where}: {info.name}",
                f"{bad} of {values.size} numbers are NaN or infinite",
            )


def _zeros(source: AdapterSource, figures: Sequence[Figures]) -> Iterable[Finding]:
    zero = [
        update.target
        for update, one in zip(source.updates, figures, strict=True)
        if one.is_b_zero
    ]
    if len(zero) == len(figures):
        yield finding("LH031", source.tensors.where, "every factor b is zero throughout")
    elif zero:
        yield finding(
            "LH032",
            source.tensors.where,
            f"{len(zero)} of {len(figures)} factors b are zero throughout: {_listed(zero)}",
        )


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
            kind = (
                update.target.rpartition(".")[2],
                update.a.shape[1:],
                update.b.shape[:1],
            )
            kinds.setdefault(kind, []).append((update.target, one.frobenius))
    for group in kinds.values():
        if len(group) < FEWEST:
            continue
        logs = [math.log(norm) for _, norm in group]
        middle = statistics.median(logs)
        deviation = statistics.median(abs(value - middle) for value in logs)
        limit = middle + OUTLYING * _TO_SIGMA * max(deviation, FLOOR)
        for target, norm in group:
            if math.log(norm) > limit:
                yield finding(
                    "LH034",
                    f"{source.tensors.where}: {target}",
                    f"the norm of its delta is {norm:.4g}, the median of the {len(group)} "
                    f"targets of its kind {math.exp(middle):.4g}",
                )


def _ranks(source: AdapterSource, figures: Sequence[Figures]) -> Iterable[Finding]:
    unused = [
        (update.target, one.used_rank, update.rank)
        for update, one in zip(source.updates, figures, strict=True)
        if 0 < one.used_rank < min(update.rank, update.a.shape[1], update.b.shape[0])
    ]
    if unused:
        target, used, rank = min(unused, key=lambda item: item[1] / item[2])
        yield finding(
            "LH035",
            source.tensors.where,
            f"{len(unused)} of {len(figures)} targets use less than their rank; least "
            f"{target}: {used} of {rank}",
        )


def _listed(targets: Sequence[str]) -> str:
    more = len(targets) - 3
    return ", ".join(targets[:3]) + (f" and {more} more" if more > 0 else "")
