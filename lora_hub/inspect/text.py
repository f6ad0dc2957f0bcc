"""A summary as text for a person: a few facts, then one line for each kind of target."""

import statistics
from collections.abc import Callable, Iterable, Sequence

from lora_hub.inspect.summary import ModuleSummary, Summary

_HEAD = (
    "target",
    "count",
    "weight",
    "rank",
    "scaling",
    "dtype",
    "norm least",
    "median",
    "most",
)


def render(summary: Summary) -> str:
    """Return the text; it ends without a newline."""
    size = (
        f"{summary.parameters:,} parameters, {summary.size_bytes:,} bytes, "
        f"{len(summary.modules)} targets"
    )
    facts = (
        ("name", " ".join(filter(None, (summary.name, summary.version)))),
        ("summary", summary.summary),
        ("license", summary.license),
        ("task", summary.task),
        ("base", summary.base or "not named"),
        ("base root", summary.base_root or "not identified: this is no package"),
        ("scaling", summary.rule),
        ("size", size),
        ("norm", f"{_number(summary.frobenius)} (Frobenius, all deltas together)"),
    )
    lines = [f"{key:<10} {value}" for key, value in facts if value]
    return "\n".join([*lines, "", *_table(summary.modules)])


def _table(modules: Sequence[ModuleSummary]) -> list[str]:
    """Return one line for each last part and shape of targets, columns aligned."""
    groups: dict[tuple[str, tuple[int, int]], list[ModuleSummary]] = {}
    for module in modules:
        key = (module.module.rpartition(".")[2], module.shape)
        groups.setdefault(key, []).append(module)
    rows = [_HEAD, *(_row(part, shape, group) for (part, shape), group in groups.items())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _row(
    part: str, shape: tuple[int, int], group: Sequence[ModuleSummary]
) -> tuple[str, ...]:
    group = sorted(group, key=lambda module: (module.rank, module.scaling))
    return (
        part,
        str(len(group)),
        f"{shape[0]}x{shape[1]}",
        _several(f"{module.rank}" for module in group),
        _several(_number(module.scaling) for module in group),
        _several(module.dtype for module in group),
        *(_norm(group, pick) for pick in (min, statistics.median, max)),
    )


def _norm(group: Sequence[ModuleSummary], pick: Callable[[list[float]], float]) -> str:
    norms = [module.frobenius for module in group if module.frobenius is not None]
    return _number(pick(norms) if len(norms) == len(group) else None)


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


def _several(values: Iterable[str]) -> str:
    distinct = list(dict.fromkeys(values))
    return distinct[0] if len(distinct) == 1 else f"{distinct[0]}…{distinct[-1]}"
