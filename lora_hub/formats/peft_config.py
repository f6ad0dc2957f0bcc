"""What an `adapter_config.json` of PEFT means for the modules in its weights.

`check_config` lets through what leaves plain LoRA as it is and refuses the rest by name,
`check_targets` and `expand` follow PEFT's match rules to the letter. Reading the tensors
and writing a config is the matter of `peft.py`.

Source: PEFT 0.21.2, `tuners/lora/config.py`, `utils/other.py:get_pattern_key`,
`tuners/tuners_utils.py:check_target_module_exists`. The author's regular expressions are
matched by `patterns.py`.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from lora_hub.errors import FormatError
from lora_hub.formats.patterns import Budget, Pattern

CONFIG_NAME = "adapter_config.json"

# Beyond this, alpha is a mistake, and its square no float.
_MAX_NUMBER = 1e150

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
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "velora_config",  # only the backward pass
    }
)

# Keys read below, value by value.
_READ = frozenset(
    {
        "alpha_pattern",
        "exclude_modules",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "r",
        "rank_pattern",
        "target_modules",
        "task_type",
        "use_rslora",
    }
)

# Keys that change what the adapter does in a way that is not read yet, and what each is.
_REFUSED = {
    "alora_invocation_tokens": "aLoRA: acts only behind an invocation text",
    "arrow_config": "Arrow: routes tokens between adapters",
    "bias": "biases of the base were trained",
    "ensure_weight_tying": "one update shared by tied layers",
    "kasa_config": "KaSA: a diagonal between the factors",
    "layer_replication": "layers of the base are repeated",
    "lora_bias": "a bias beside the factors",
    "megatron_config": "layers split by Megatron",
    "modules_to_save": "whole layers were trained and saved",
    "monteclora_config": "MonteCLoRA: factors drawn at random",
    "target_parameters": "updates of parameters that are no layers",
    "trainable_token_indices": "rows of the embedding were trained",
    "use_bdlora": "BD-LoRA: block-diagonal factors",
    "use_dora": "DoRA: the base's weight is scaled too",
    "use_qalora": "QA-LoRA: inputs are pooled in groups",
}

_LAYERS_NAME = re.compile(r"\w+(\\?\.\w+)*")

# Values of init_lora_weights that leave the base as it was. The others (pissa, olora,
# corda, loftq, lora_ga) subtract from the base's weights: the adapter is right only on
# the changed base, which nobody has.
_KIND_STARTS = frozenset({"gaussian", "eva", "orthogonal"})


def check_config(config: Mapping[str, Any], where: str) -> None:
    peft_type = config.get("peft_type")
    if peft_type != "LORA":
        raise FormatError(
            "peft_type is missing"
            if peft_type is None
            else f"peft_type is {peft_type!r}, only 'LORA' is read",
            where=where,
            hint="plain LoRA and rsLoRA on linear layers can be read",
        )
    for key, value in config.items():
        if key in _REFUSED and not (_is_neutral(value) or (key, value) == ("bias", "none")):
            raise FormatError(
                f"{key} is {_short(value)} ({_REFUSED[key]}), which is not read yet",
                where=where,
            )
        if key not in _REFUSED.keys() | _READ | _INERT and not _is_neutral(value):
            raise FormatError(
                f"the key {key!r} is not known and its value {_short(value)} may change "
                "what the adapter does",
                where=where,
                hint="remove the key if it belongs to a tool and means nothing to PEFT",
            )
    _check_start(config.get("init_lora_weights"), where)
    for key, (is_right, expected) in _TYPES.items():
        if key in config and not is_right(config[key]):
            raise FormatError(
                f"{key} is {_short(config[key])}, expected {expected}", where=where
            )


def _check_start(value: Any, where: str) -> None:
    if value is None or isinstance(value, bool):
        return
    if not isinstance(value, str) or value.lower() not in _KIND_STARTS:
        raise FormatError(
            f"init_lora_weights is {_short(value)}, which changes the base's weights "
            "before training: the adapter is right only on that changed base",
            where=where,
            hint="convert it to plain LoRA in PEFT: save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...)",
        )


def _is_neutral(value: Any) -> bool:
    # An integer 0 is not: PEFT has no key whose zero means "off".
    return value is None or value is False or value in ([], {})


def _is_number(value: Any) -> bool:
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        # Not math.isfinite, which fails for integers that no float holds.
        and abs(value) <= _MAX_NUMBER
    )


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_pattern(is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: (
        value is None
        or (isinstance(value, dict) and all(is_right(item) for item in value.values()))
    )


_Check = tuple[Callable[[Any], bool], str]
_TEXT: _Check = (lambda value: value is None or isinstance(value, str), "a text or null")
_NAMES: _Check = (
    lambda value: value is None or isinstance(value, str) or _is_strings(value),
    "a list of names, or one regular expression",
)
_TYPES: dict[str, _Check] = {
    "alpha_pattern": (_is_pattern(_is_number), "an object of names and numbers"),
    "base_model_name_or_path": _TEXT,
    "exclude_modules": _NAMES,
    "layers_pattern": _NAMES,
    "layers_to_transform": (
        lambda value: (
            value is None
            or type(value) is int
            or (isinstance(value, list) and all(type(item) is int for item in value))
        ),
        "a list of numbers",
    ),
    "lora_alpha": (_is_number, "a finite number"),
    "r": (_is_rank, "an integer of at least 1"),
    "rank_pattern": (
        _is_pattern(_is_rank),
        "an object of names and integers from 1",
    ),
    "revision": _TEXT,
    "target_modules": _NAMES,
    "task_type": (
        lambda value: value is None or (isinstance(value, str) and value in TASK_TYPES),
        f"one of {', '.join(sorted(TASK_TYPES))}, or null",
    ),
    "use_rslora": (lambda value: value is None or isinstance(value, bool), "true or false"),
}


def expand(
    config: Mapping[str, Any],
    pattern: str,
    key: str,
    default: float,
    names: list[str],
    where: str,
) -> dict[str, Any]:
    """Return name → the value of the first pattern that matches, else the plain value."""
    budget = Budget()
    patterns = {
        text: (
            Pattern(
                rf"(.*\.)?({text})$", text=text, where=f"{where}#/{pattern}", budget=budget
            ),
            value,
        )
        for text, value in (config.get(pattern) or {}).items()
    }
    for text, (expression, _) in patterns.items():
        if not any(expression.is_match(name) for name in names):
            raise FormatError(
                f"the key {text!r} of {pattern} matches no module in the weights",
                where=where,
                hint="remove it, or save the adapter again: PEFT ignores it in silence",
            )
    plain = config.get(key, default)
    return {
        name: next(
            (value for expression, value in patterns.values() if expression.is_match(name)),
            plain,
        )
        for name in names
    }


def check_targets(config: Mapping[str, Any], keys: list[str], where: str) -> None:
    """Raise `FormatError` unless target_modules names exactly the modules in the weights.

    Args:
        config: checked by `check_config`.
        keys: the modules' paths as PEFT sees them.
        where: the config's path, for messages.
    """
    targets = config.get("target_modules")
    if isinstance(targets, list):
        unmatched = dict.fromkeys(targets)
        for key in keys:
            for ending in _endings(key):
                unmatched.pop(ending, None)
        for entry in unmatched:
            raise FormatError(
                f"target_modules lists {entry!r}, and the weights hold no such module",
                where=where,
                hint="the file may be incomplete, or belong to another config",
            )
    is_excluded = _matcher(config.get("exclude_modules") or [], f"{where}#/exclude_modules")
    is_any = targets is None or targets == "all-linear"
    is_listed = _matcher(".*" if is_any else targets, f"{where}#/target_modules")
    is_in_layer = _layer_matcher(config, f"{where}#/layers_pattern")
    for key in keys:
        if is_excluded(key) or not is_listed(key) or not is_in_layer(key):
            raise FormatError(
                f"the weights hold {key}, which the config's target_modules, "
                "exclude_modules or layers_to_transform leaves out: PEFT would drop it in "
                "silence",
                where=where,
            )


def _matcher(chosen: Any, where: str) -> Callable[[str], bool]:
    if isinstance(chosen, str):
        return Pattern(chosen, where=where, budget=Budget(), whole=True).is_match
    names = set(chosen)
    return lambda key: not names.isdisjoint(_endings(key))


def _endings(key: str) -> list[str]:
    """Return the names by which a list can mean a module: whole dotted parts at its end."""
    starts = [0, *(index + 1 for index, character in enumerate(key) if character == ".")]
    return [key[start:] for start in starts]


def _layer_matcher(config: Mapping[str, Any], where: str) -> Callable[[str], bool]:
    layers = config.get("layers_to_transform")
    targets = config.get("target_modules")
    if layers is None or layers == [] or not isinstance(targets, list):
        return lambda key: True
    patterns = config.get("layers_pattern") or []
    texts = [patterns] if isinstance(patterns, str) else patterns
    for text in texts:
        # Which of several numbers an expression finds first, only `re` can tell.
        if not _LAYERS_NAME.fullmatch(text):
            raise FormatError(
                f"{_short(text)} is no plain name, others are not read yet", where=where
            )
    expressions = [re.compile(rf"(?:^|.*?\.){text}\.(?P<idx>\d+)\.") for text in texts] or [
        re.compile(r".*?\.[^.]*\.(?P<idx>\d+)\.")
    ]
    chosen = {layers} if isinstance(layers, int) else set(layers)
    whole = set(targets)

    def is_chosen(key: str) -> bool:
        if key in whole:
            return True  # a module listed by its whole path is meant, whatever its layer
        for expression in expressions:
            match = expression.match(key)
            if match:
                return int(match["idx"]) in chosen
        return False

    return is_chosen


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
