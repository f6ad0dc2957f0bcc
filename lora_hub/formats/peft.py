"""PEFT's directory: `adapter_config.json` and `adapter_model.safetensors`, both ways.

Reads plain LoRA and rsLoRA on linear layers, with `rank_pattern` and `alpha_pattern`
expanded, so that nobody behind this file needs to know PEFT's match rules. The tensors
decide which modules are adapted; the config must agree with them (`peft_config.py`).
Finding the files is the matter of `detect.py`.

Source: PEFT 0.21.2, `utils/save_and_load.py` for the names of tensors.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lora_hub.errors import FormatError
from lora_hub.formats.peft_config import (
    CONFIG_NAME,
    DEFAULT_ALPHA,
    DEFAULT_RANK,
    check_config,
    check_targets,
    expand,
)
from lora_hub.formats.source import AdapterSource, UpdateSource
from lora_hub.scaling import ScalingRule
from lora_hub.tensors.file import TensorFile
from lora_hub.tensors.header import TensorInfo

WEIGHTS_NAME = "adapter_model.safetensors"

# What multiplies exactly in PEFT and in our own runtime.
FACTOR_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})

_FACTOR = re.compile(r"(.+)\.lora_([AB])\.weight")
_PREFIX = "base_model.model."

# What stands behind the last part of names that are no factors of a linear layer.
_OTHER_TENSORS = {
    "lora_embedding_A": "the update of an embedding",
    "lora_embedding_B": "the update of an embedding",
    "lora_magnitude_vector": "a magnitude of DoRA",
    "lora_B.bias": "a bias beside the factors",
    "trainable_tokens_delta": "trained rows of an embedding",
    "lora_diag": "a diagonal of KaSA",
}


@dataclass(slots=True)
class _Pair:
    """The two factors of one module, as far as they were found."""

    key: str  # the module's path as PEFT sees it
    factors: dict[str, TensorInfo] = field(default_factory=dict)


def read_peft(
    config: Mapping[str, Any], tensors: TensorFile, *, where: str
) -> AdapterSource:
    """Return what the config and the tensors say together.

    Args:
        config: the object in `adapter_config.json`.
        tensors: the file beside it.
        where: the directory, for messages.

    Raises:
        FormatError: the adapter is of another kind, config and tensors disagree, or a
            key or tensor means something that cannot be applied exactly.
    """
    config_where = f"{where}/{CONFIG_NAME}"
    check_config(config, config_where)
    pairs = _pair(tensors, f"{where}/{WEIGHTS_NAME}")
    keys = [pair.key for pair in pairs.values()]
    check_targets(config, keys, config_where)
    ranks = expand(config, "rank_pattern", "r", DEFAULT_RANK, keys, config_where)
    alphas = expand(
        config, "alpha_pattern", "lora_alpha", DEFAULT_ALPHA, keys, config_where
    )
    rule: ScalingRule = "alpha/sqrt(r)" if config.get("use_rslora") else "alpha/r"
    updates = []
    for target in sorted(pairs):
        pair = pairs[target]
        a, b = pair.factors["A"], pair.factors["B"]
        _check_factors(target, a, b, ranks[pair.key], where)
        updates.append(
            UpdateSource(target, a.shape[0], float(alphas[pair.key]), rule, a, b)
        )
    return AdapterSource(
        updates=tuple(updates),
        tensors=tensors,
        base_name=config.get("base_model_name_or_path"),
        base_revision=config.get("revision"),
        task_type=config.get("task_type"),
    )


def config_for(
    source: AdapterSource,
    *,
    base_name: str | None = None,
    revision: str | None = None,
    base_tensors: Collection[str] | None = None,
) -> dict[str, Any]:
    """Return the smallest config with which PEFT applies the source's updates as they are.

    See `build_config`; the task type is the source's.
    """
    return build_config(
        {update.target: (update.rank, update.alpha) for update in source.updates},
        source.updates[0].rule,
        task_type=source.task_type,
        base_name=base_name,
        revision=revision,
        base_tensors=base_tensors,
    )


def build_config(
    parts: Mapping[str, tuple[int, float]],
    rule: ScalingRule,
    *,
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
        task_type: PEFT's, one of `peft_config.TASK_TYPES`.
        base_name: where the base may be found, never a local path.
        revision: of the base there.
        base_tensors: names of the base's tensors, if known: then `target_modules` holds
            last parts (`q_proj`) where these match nothing but targets.
    """
    rank = _most_common(rank for rank, _ in parts.values())
    alpha = _most_common(alpha for _, alpha in parts.values())
    optional = {
        "alpha_pattern": _pattern(
            {name: _number(at) for name, (_, at) in parts.items()}, alpha
        ),
        "base_model_name_or_path": base_name,
        "rank_pattern": _pattern({name: rank for name, (rank, _) in parts.items()}, rank),
        "revision": revision,
        "task_type": task_type,
        "use_rslora": rule == "alpha/sqrt(r)",
    }
    config = {
        "inference_mode": True,
        "lora_alpha": _number(alpha),
        "peft_type": "LORA",
        "r": rank,
        "target_modules": _target_modules(parts, base_tensors),
        **{key: value for key, value in optional.items() if value},
    }
    return dict(sorted(config.items()))


def tensor_names(target: str) -> tuple[str, str]:
    """Return the names under which PEFT keeps the factors a and b of a target."""
    return f"{_PREFIX}{target}.lora_A.weight", f"{_PREFIX}{target}.lora_B.weight"


# ── reading: the tensors ─────────────────────────────────────────────────────────────


def _pair(tensors: TensorFile, where: str) -> dict[str, _Pair]:
    """Return target → its two factors; every tensor of the file is in exactly one pair."""
    pairs: dict[str, _Pair] = {}
    for name, tensor in tensors.header.tensors.items():
        match = _FACTOR.fullmatch(name)
        if match is None or not match[1].startswith(_PREFIX):
            raise FormatError(_describe_tensor(name), where=where)
        key = match[1].removeprefix(_PREFIX)
        target = key
        # An adapter trained on top of a PeftModel carries the prefix once more.
        while target.startswith(_PREFIX):
            target = target.removeprefix(_PREFIX)
        pair = pairs.setdefault(target, _Pair(key))
        if match[2] in pair.factors or pair.key != key:
            raise FormatError(f"two tensors are factors of {target}", where=where)
        pair.factors[match[2]] = tensor
    if not pairs:
        raise FormatError("the file holds no tensors", where=where)
    for target, pair in pairs.items():
        missing = {"A", "B"} - pair.factors.keys()
        if missing:
            raise FormatError(
                f"{target} has no lora_{missing.pop()} beside its other factor",
                where=where,
                hint="both factors are needed; the file is incomplete",
            )
    return pairs


def _describe_tensor(name: str) -> str:
    for suffix, meaning in _OTHER_TENSORS.items():
        if name.removesuffix(".weight").endswith(f".{suffix}"):
            return f"the tensor {name!r} is {meaning}, which is not read yet"
    if not name.startswith(_PREFIX):
        return f"the tensor {name!r} is not named as PEFT does ({_PREFIX}….lora_A.weight)"
    return f"the tensor {name!r} is no low-rank factor: whole weights are not read yet"


def _check_factors(
    target: str, a: TensorInfo, b: TensorInfo, rank: int, where: str
) -> None:
    shapes = f"lora_A is {list(a.shape)} and lora_B {list(b.shape)}"
    if len(a.shape) != 2 or len(b.shape) != 2:
        raise FormatError(
            f"{target}: {shapes}; only linear layers (two axes) are read yet", where=where
        )
    if a.shape[0] != b.shape[1] or 0 in a.shape + b.shape:
        raise FormatError(
            f"{target}: {shapes}; expected [rank, in] and [out, rank] of one rank",
            where=where,
        )
    if a.shape[0] != rank:
        raise FormatError(
            f"{target}: the factors have rank {a.shape[0]}, {CONFIG_NAME} says {rank}",
            where=where,
            hint="the scaling alpha/rank would be a guess; mend r or rank_pattern",
        )
    if a.dtype != b.dtype or a.dtype not in FACTOR_DTYPES:
        raise FormatError(
            f"{target}: the factors are {a.dtype} and {b.dtype}; expected one of "
            f"{', '.join(sorted(FACTOR_DTYPES))} for both",
            where=where,
        )


# ── writing ──────────────────────────────────────────────────────────────────────────


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
