"""`AdapterSource` → what PEFT loads with the same effect: its config, its names of tensors.

What it cannot say is refused by name (`peft_sayable.py`). Moving is all that happens to
tensors; their bytes stay.

Source: PEFT 0.21.2; the rules by which it finds modules again are in `peft_targets.py`.
"""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import msgspec

from lora_hub.formats.peft_build import build_config
from lora_hub.formats.peft_experts import wrapped_paths
from lora_hub.formats.peft_sayable import check_sayable, saved_modules
from lora_hub.formats.peft_shapes import magnitude_shape
from lora_hub.formats.peft_tensors import PREFIX, ROWS, WRAPPED, update_names
from lora_hub.formats.source import AdapterSource, Replacement, UpdateSource
from lora_hub.scaling import ScalingRule, alpha_of
from lora_hub.tensors.header import TensorInfo


def config_for(
    source: AdapterSource,
    *,
    base_name: str | None = None,
    revision: str | None = None,
    base_tensors: Collection[str] | None = None,
) -> dict[str, Any]:
    """Return the smallest config with which PEFT applies the source as it is.

    See `build_config`; the task type is the source's.

    Raises:
        LossyConversion: PEFT cannot say it.
    """
    check_sayable(source)
    parts, rule = _scalings(source.updates)
    plain = build_config(
        parts,
        rule,
        # A tied layer has no name here, so PEFT must find its rank and alpha as the rest.
        plain=_of_embedding(source, parts) if source.ties_weights else None,
        parameters={u.target for u in source.updates if u.layer == "experts"},
        task_type=source.task_type,
        base_name=base_name,
        revision=revision,
        base_tensors=base_tensors,
    )
    rows = {
        each.name.removesuffix(".weight"): list(each.rows)
        for each in source.replacements
        if each.rows is not None
    }
    more = {
        "alora_invocation_tokens": list(source.alora_tokens),
        "bias": _bias(source),
        "ensure_weight_tying": source.ties_weights,
        "lora_bias": any(update.bias is not None for update in source.updates),
        "modules_to_save": saved_modules(source.replacements, source.task_type),
        "trainable_token_indices": rows,
        "use_dora": any(update.magnitude is not None for update in source.updates),
    }
    added = {key: value for key, value in more.items() if value}
    return dict(sorted((plain | added).items()))


def tensors_for(source: AdapterSource) -> dict[str, TensorInfo]:
    """Return name in PEFT's file → tensor of the source, for every one there is.

    A tensor's `name` is where its bytes are read in `source.tensors`; its `shape` is the
    one to write, with the same bytes (PEFT keeps a convolution's magnitude with axes of
    one).

    Raises:
        LossyConversion: as `config_for`.
    """
    check_sayable(source)
    paths = _paths(source)
    found: dict[str, TensorInfo] = {}
    for update in source.updates:
        found |= update_names(_as_saved(update), paths[update.target])
    wrappers = Counter(map(_module, source.updates))
    for each in source.replacements:
        found[_replaced_name(each, wrappers)] = each.tensor
    return found


def tensor_names(target: str) -> tuple[str, str]:
    """Return the names under which PEFT keeps the factors a and b of a linear target."""
    return f"{PREFIX}{target}.lora_A.weight", f"{PREFIX}{target}.lora_B.weight"


# ── names ────────────────────────────────────────────────────────────────────────────


def _module(update: UpdateSource) -> str:
    """Return the path of the module that PEFT wraps for an update."""
    return update.target.rpartition(".")[0] if update.layer == "experts" else update.target


def _paths(source: AdapterSource) -> dict[str, str]:
    """Return target → the path under which PEFT keeps its factors."""
    parameters = [u.target for u in source.updates if u.layer == "experts"]
    modules = {u.target: u.target for u in source.updates if u.layer != "experts"}
    return modules | (wrapped_paths(parameters) or {})


def _as_saved(update: UpdateSource) -> UpdateSource:
    if update.magnitude is None:
        return update
    shaped = msgspec.structs.replace(update.magnitude, shape=magnitude_shape(update))
    return replace(update, magnitude=shaped)


def _replaced_name(each: Replacement, wrappers: Mapping[str, int]) -> str:
    """Return the name in PEFT's file; `wrappers` counts them around each module."""
    if each.rows is not None:
        return PREFIX + each.name.removesuffix(".weight") + ROWS
    name = each.name
    for end in (index for index in range(len(name)) if name[index] == "."):
        if count := wrappers.get(name[:end]):
            return PREFIX + name[:end] + count * WRAPPED + name[end:]
    return PREFIX + name


def _bias(source: AdapterSource) -> str:
    modules = {
        each.name.rpartition(".")[0] for each in source.replacements if each.role == "bias"
    }
    if not modules:
        return ""
    return "lora_only" if modules <= set(map(_module, source.updates)) else "all"


# ── numbers ──────────────────────────────────────────────────────────────────────────


def _scalings(
    updates: Collection[UpdateSource],
) -> tuple[dict[str, tuple[int, float]], ScalingRule]:
    """Return target → rank and alpha, and the rule for all."""
    rules = {update.rule for update in updates}
    if len(rules) == 1:
        return {u.target: (u.rank, u.alpha) for u in updates}, rules.pop()
    return {
        u.target: (u.rank, alpha_of(u.scaling, u.rank, "alpha/r")) for u in updates
    }, "alpha/r"


def _of_embedding(
    source: AdapterSource, parts: Mapping[str, tuple[int, float]]
) -> tuple[int, float] | None:
    found = [parts[u.target] for u in source.updates if u.layer == "embedding"]
    return found[0] if found else None
