"""A summary as text for a person: a few facts, then one line for each kind of target."""

import statistics
from collections.abc import Callable, Iterable, Sequence

from lora_hub.inspect.summary import (
    ModuleSummary,
    ReplacedSummary,
    ScaledSummary,
    Summary,
)

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
    targets = {one.module for one in summary.modules}
    targets |= {one.module for one in summary.scaled}
    size = (
        f"{summary.parameters:,} parameters, {summary.size_bytes:,} bytes, "
        f"{len(targets)} targets"
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
        ("norm", _norms(summary) if summary.modules else None),
        ("acts", _acts(summary.alora_tokens)),
        ("tied", "the head takes the embedding's update" if summary.ties_weights else ""),
    )
    lines = [f"{key:<10} {value}" for key, value in facts if value]
    tables = (_updates(summary.modules), _scales(summary.scaled), _new(summary.replaced))
    return "\n".join([*lines, *(line for table in tables for line in table)])


def _norms(summary: Summary) -> str:
    what = "Frobenius, all deltas together"
    if any(module.is_dora for module in summary.modules):
        what += "; of DoRA the low-rank part"
    return f"{_number(summary.frobenius)} ({what})"


def _acts(tokens: tuple[int, ...]) -> str:
    if not tokens:
        return ""
    return f"from the last occurrence of the tokens {', '.join(map(str, tokens))} on"


def _updates(modules: Sequence[ModuleSummary]) -> list[str]:
    """Return one line for each last part, kind and shape of targets."""
    groups: dict[tuple[str, str, tuple[int, ...]], list[ModuleSummary]] = {}
    for module in modules:
        key = (module.module.rpartition(".")[2], _kind(module), module.shape)
        groups.setdefault(key, []).append(module)
    return _table([_HEAD, *(_row(*key, group) for key, group in groups.items())])


def _kind(module: ModuleSummary) -> str:
    """Return what is to be said of a target that is not plain LoRA of a linear layer."""
    words = (
        "" if module.layer == "linear" else module.layer,
        "DoRA" if module.is_dora else "",
        "bias" if module.has_bias else "",
    )
    return ", ".join(filter(None, words))


def _scales(scaled: Sequence[ScaledSummary]) -> list[str]:
    groups: dict[tuple[str, str, int, str], int] = {}
    for one in scaled:
        key = (one.module.rpartition(".")[2], one.axis, one.parameters, one.dtype)
        groups[key] = groups.get(key, 0) + 1
    said = {"rows": "outputs", "columns": "inputs"}
    return _table(
        [
            ("scaled", "count", "numbers", "dtype"),
            *(
                (part, str(count), f"{length} {said[axis]}", dtype)
                for (part, axis, length, dtype), count in groups.items()
            ),
        ]
    )


def _new(replaced: Sequence[ReplacedSummary]) -> list[str]:
    return _table(
        [
            ("brought anew", "why", "shape", "dtype"),
            *(
                (
                    one.name if one.rows is None else f"{one.name}, {len(one.rows)} rows",
                    one.role,
                    "x".join(map(str, one.shape)),
                    one.dtype,
                )
                for one in replaced
            ),
        ]
    )


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Return an empty line and the rows, columns aligned; nothing for a head alone."""
    if len(rows) == 1:
        return []
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "",
        *(
            "  ".join(
                cell.rjust(width) if index else cell.ljust(width)
                for index, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ),
    ]


def _row(
    part: str, kind: str, shape: tuple[int, ...], group: Sequence[ModuleSummary]
) -> tuple[str, ...]:
    group = sorted(group, key=lambda module: (module.rank, module.scaling))
    return (
        f"{part} ({kind})" if kind else part,
        str(len(group)),
        "x".join(map(str, shape)),
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
