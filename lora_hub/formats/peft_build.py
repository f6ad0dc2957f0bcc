"""The smallest `adapter_config.json` with which PEFT finds targets, ranks and alphas again.

Source: PEFT 0.21.2; its match rules are in `peft_targets.py`.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from lora_hub.scaling import ScalingRule


def build_config(
    parts: Mapping[str, tuple[int, float]],
    rule: ScalingRule,
    *,
    parameters: Collection[str] = (),
    plain: tuple[int, float] | None = None,
    task_type: str | None = None,
    base_name: str | None = None,
    revision: str | None = None,
    base_tensors: Collection[str] | None = None,
) -> dict[str, Any]:
    """Return the smallest config for targets with these ranks and alphas.

    Only keys that differ from PEFT's defaults, besides the few that engines expect. Each
    pattern matches by the whole last part of a name or by the whole name, so the order
    of patterns has no meaning and canonical JSON may sort them.

    Args:
        parts: target → (rank, alpha), at least one.
        rule: the scaling of all of them; PEFT knows one rule an adapter.
        parameters: those of the targets that are parameters and no modules.
        plain: rank and alpha of what no pattern matches, the most common by default.
        task_type: PEFT's, one of `peft_config.TASK_TYPES`.
        base_name: where the base may be found, never a local path.
        revision: of the base there.
        base_tensors: names of the base's tensors, if known: then `target_modules` holds
            last parts (`q_proj`) where these match nothing but targets.
    """
    rank, alpha = plain or (
        _most_common(rank for rank, _ in parts.values()),
        _most_common(alpha for _, alpha in parts.values()),
    )
    optional = {
        "alpha_pattern": _pattern(
            {name: _number(at) for name, (_, at) in parts.items()}, alpha
        ),
        "base_model_name_or_path": base_name,
        "rank_pattern": _pattern({name: rank for name, (rank, _) in parts.items()}, rank),
        "revision": revision,
        # Whole names: of a base that keeps each expert apart, nobody knows the others.
        "target_parameters": sorted(parameters),
        "task_type": task_type,
        "use_rslora": rule == "alpha/sqrt(r)",
    }
    modules = [target for target in parts if target not in parameters]
    config = {
        "inference_mode": True,
        "lora_alpha": _number(alpha),
        "peft_type": "LORA",
        "r": rank,
        "target_modules": _target_modules(modules, base_tensors),
        **{key: value for key, value in optional.items() if value},
    }
    return dict(sorted(config.items()))


def _pattern(values: Mapping[str, Any], plain: Any) -> dict[str, Any]:
    """Return the entries that PEFT needs besides the plain value.

    The last part of a name where all targets of that part agree, else `^` and the whole
    name with its dots escaped: PEFT reads both as regular expressions.
    """
    by_part: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        by_part.setdefault(_last_part(name), {})[name] = value
    pattern: dict[str, Any] = {}
    for part, group in by_part.items():
        if len(set(group.values())) == 1:
            pattern[re.escape(part)] = next(iter(group.values()))
        else:
            pattern |= {f"^{re.escape(name)}": value for name, value in group.items()}
    return {key: value for key, value in sorted(pattern.items()) if value != plain}


def _target_modules(
    targets: Collection[str], base_tensors: Collection[str] | None
) -> list[str]:
    if base_tensors is None:
        return sorted(targets)
    modules = {
        name[:end] for name in base_tensors for end in range(len(name)) if name[end] == "."
    }
    matched_too = {_last_part(module) for module in modules - set(targets)}
    return sorted(
        {
            target if _last_part(target) in matched_too else _last_part(target)
            for target in targets
        }
    )


def _most_common(values: Iterable[float]) -> Any:
    # Of two equally common ones the smaller, so that the order of targets has no say.
    return max(sorted(Counter(values).items()), key=lambda item: item[1])[0]


def _number(value: float) -> float:
    # Integers beyond 2**53 have no place in canonical JSON.
    return int(value) if abs(value) < 2**53 and value == int(value) else value


def _last_part(name: str) -> str:
    return name.rpartition(".")[2]
