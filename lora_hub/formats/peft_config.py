"""What the keys of an `adapter_config.json` of PEFT's LoRA may say.

`check_config` lets through what is read and what leaves the adapter as it is, and refuses
the rest by name. Which modules the config means is the matter of `peft_targets.py`, what
the tensors must be then of `peft.py`.

Source: PEFT 0.21.2, `tuners/lora/config.py`.
"""

from collections.abc import Callable, Mapping
from typing import Any

from lora_hub.errors import FormatError
from lora_hub.formats import peft_types
from lora_hub.scaling import is_alpha

# A rank of 8 and an alpha of 8 are what PEFT takes where the config is silent.
DEFAULT_RANK = 8
DEFAULT_ALPHA = 8

TASK_TYPES = frozenset(
    {
        "CAUSAL_LM",
        "SEQ_CLS",
        "SEQ_2_SEQ_LM",
        "TOKEN_CLS",
        "QUESTION_ANS",
        "FEATURE_EXTRACTION",
    }
)

# Keys whose value does not change what a trained adapter does: notes about the training,
# and settings of an initialisation (which of them was used, `init_lora_weights` says).
_INERT = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "eva_config",
        "fan_in_fan_out",  # how the base stores its weight: the factors are the same
        "inference_mode",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "merge_weights",  # PEFT 0.2: when the layers were to merge
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "velora_config",  # only the backward pass
    }
)

# Keys read value by value.
_READ = frozenset(
    {
        "alora_invocation_tokens",
        "alpha_pattern",
        "bias",
        "ensure_weight_tying",
        "exclude_modules",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_bias",
        "modules_to_save",
        "r",
        "rank_pattern",
        "target_modules",
        "target_parameters",
        "task_type",
        "trainable_token_indices",
        "use_dora",
        "use_rslora",
    }
)

# Keys that change what the adapter does in a way that is not read, and what each is.
_REFUSED = {
    "arrow_config": "Arrow: routes tokens between adapters",
    "kasa_config": "KaSA: a diagonal between the factors, on a truncated base",
    "layer_replication": "layers of the base are repeated",
    "megatron_config": "layers split by Megatron",
    "monteclora_config": "MonteCLoRA: factors drawn at random",
    "use_bdlora": "BD-LoRA: block-diagonal factors",
    "use_qalora": "QA-LoRA: inputs are pooled in groups",
}

# Values of init_lora_weights that leave the base as it was. The others subtract from the
# base's weights: the adapter is right only on the changed base, which nobody has.
_KIND_STARTS = frozenset({"eva", "gaussian", "mica", "orthogonal"})

# Of the others, those that the factors of before the training undo (`peft_initial.py`).
_UNDOABLE = ("corda", "lora_ga", "olora", "pissa")


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Raise `FormatError` where the config says what is not read, whatever the tensors.

    A start that changed the base and can be undone passes here; see `check_start`.
    """
    peft_types.check_type(config, where)
    if config.get("peft_type") != "LORA":
        return  # its keys are other ones, and its reader's matter
    for key, value in config.items():
        if key in _REFUSED and not _is_neutral(value):
            raise FormatError(
                f"{key} is {_short(value)} ({_REFUSED[key]}), which is not read yet",
                where=where,
                hint="merge it into its base with PEFT",
            )
        if key not in _REFUSED.keys() | _READ | _INERT and not _is_neutral(value):
            raise FormatError(
                f"the key {key!r} is not known and its value {_short(value)} may change "
                "what the adapter does",
                where=where,
                hint="remove the key if it belongs to a tool and means nothing to PEFT",
            )
    if not is_undoable(config):
        check_start(config, where)
    for key, (is_right, expected) in _TYPES.items():
        if key in config and not is_right(config[key]):
            raise FormatError(
                f"{key} is {_short(config[key])}, expected {expected}", where=where
            )
    _check_layers(config, where)


def check_start(config: Mapping[str, Any], where: str) -> None:
    """Raise `FormatError` if `init_lora_weights` changed the base before training."""
    value = config.get("init_lora_weights")
    if value is None or isinstance(value, bool):
        return
    if not isinstance(value, str) or value.lower() not in _KIND_STARTS:
        way_out = (
            "give the factors of before the training with --initial, or "
            if is_undoable(config)
            else ""
        )
        raise FormatError(
            f"init_lora_weights is {_short(value)}, which changes the base's weights "
            "before training: the adapter is right only on that changed base",
            where=where,
            hint=f"{way_out}convert it to plain LoRA in PEFT: save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...)",
        )


def is_undoable(config: Mapping[str, Any]) -> bool:
    """Return whether the factors of before the training undo the change of the base."""
    value = config.get("init_lora_weights")
    return isinstance(value, str) and value.lower().startswith(_UNDOABLE)


def _check_layers(config: Mapping[str, Any], where: str) -> None:
    layers, targets = config.get("layers_to_transform"), config.get("target_modules")
    is_chosen = layers is not None and layers != []
    if is_chosen and isinstance(targets, str):
        raise FormatError(
            f"layers_to_transform is {_short(layers)} beside the expression "
            f"{_short(targets)}: PEFT takes it only beside a list of target_modules",
            where=where,
        )
    pattern = config.get("layers_pattern")
    if pattern and (layers is None or isinstance(targets, str)):
        raise FormatError(
            f"layers_pattern is {_short(pattern)} without layers_to_transform and a list "
            "of target_modules, which PEFT refuses",
            where=where,
        )


# ── values ───────────────────────────────────────────────────────────────────────────


def _is_neutral(value: Any) -> bool:
    # An integer 0 is not: PEFT has no key whose zero means "off".
    return value is None or value is False or value in ([], {})


def _is_number(value: Any) -> bool:
    return (
        isinstance(value, (int, float)) and not isinstance(value, bool) and is_alpha(value)
    )


def _is_rank(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_indices(value: Any) -> bool:
    return isinstance(value, list) and all(
        type(item) is int and 0 <= item < 2**53 for item in value
    )


def _is_pattern(is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(is_right, value.values()))


_Check = tuple[Callable[[Any], bool], str]


def _or_null(is_right: Callable[[Any], bool], expected: str) -> _Check:
    return lambda value: value is None or is_right(value), expected


_FLAG = _or_null(lambda value: isinstance(value, bool), "true or false")
_LIST = _or_null(
    lambda value: _is_strings(value) and "" not in value, "a list of names, or null"
)
_NAMES = _or_null(
    lambda value: isinstance(value, str) or _is_strings(value),
    "a list of names, or one regular expression",
)
_TEXT = _or_null(lambda value: isinstance(value, str), "a text or null")
_TYPES: dict[str, _Check] = {
    "alora_invocation_tokens": _or_null(_is_indices, "a list of tokens, or null"),
    "alpha_pattern": _or_null(_is_pattern(_is_number), "an object of names and numbers"),
    "base_model_name_or_path": _TEXT,
    "bias": _or_null(
        lambda value: isinstance(value, str) and value in ("none", "all", "lora_only"),
        "'none', 'all' or 'lora_only'",
    ),
    "ensure_weight_tying": _FLAG,
    "exclude_modules": _NAMES,
    "layers_pattern": _NAMES,
    "layers_to_transform": _or_null(
        lambda value: (
            type(value) is int
            or (isinstance(value, list) and all(type(item) is int for item in value))
        ),
        "a list of numbers",
    ),
    "lora_alpha": (_is_number, "a finite number"),
    "lora_bias": _FLAG,
    "modules_to_save": _LIST,
    "r": (_is_rank, "an integer of at least 1"),
    "rank_pattern": _or_null(
        _is_pattern(_is_rank), "an object of names and integers from 1"
    ),
    "revision": _TEXT,
    "target_modules": _NAMES,
    "target_parameters": _LIST,
    "task_type": _or_null(
        lambda value: isinstance(value, str) and value in TASK_TYPES,
        f"one of {', '.join(sorted(TASK_TYPES))}, or null",
    ),
    "trainable_token_indices": _or_null(
        lambda value: _is_indices(value) or _is_pattern(_is_indices)(value),
        "a list of tokens, or an object of modules and such lists",
    ),
    "use_dora": _FLAG,
    "use_rslora": _FLAG,
}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
