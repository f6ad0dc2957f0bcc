"""PEFT's LoRA: `adapter_config.json` and `adapter_model.safetensors` → `AdapterSource`.

All of it: linear layers, embeddings, convolutions and experts' parameters; rsLoRA, DoRA,
biases, weights that were trained whole, rows of embeddings, tied weights, aLoRA. Patterns
are expanded, so that nobody behind this file needs to know PEFT's match rules. The tensors
decide what is adapted; the config must agree with them. Nothing is left out in silence but
copies: of a bias within a module saved whole, and of factors for a tied layer.

The way back is `peft_write.py`, finding the files `detect.py`.

Source: PEFT 0.21.2, `utils/save_and_load.py` for the names of tensors.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_hub.errors import FormatError
from lora_hub.formats.files import CONFIG_NAME
from lora_hub.formats.patterns import Budget
from lora_hub.formats.peft_build import build_config
from lora_hub.formats.peft_config import (
    DEFAULT_ALPHA,
    DEFAULT_RANK,
    check_config,
    check_start,
)
from lora_hub.formats.peft_experts import find_parameters
from lora_hub.formats.peft_replaced import read_replaced
from lora_hub.formats.peft_sayable import losses_of
from lora_hub.formats.peft_shapes import make_update
from lora_hub.formats.peft_targets import check_targets, expand
from lora_hub.formats.peft_tensors import WEIGHTS_NAME, Named, sort_out
from lora_hub.formats.peft_ties import check_replaced, is_held, tied_targets, ties
from lora_hub.formats.peft_write import config_for, tensor_names, tensors_for
from lora_hub.formats.source import AdapterSource, UpdateSource
from lora_hub.scaling import ScalingRule
from lora_hub.tensors.file import TensorFile

__all__ = [
    "WEIGHTS_NAME",
    "build_config",
    "config_for",
    "read_peft",
    "tensor_names",
    "tensors_for",
]


def read_peft(
    config: Mapping[str, Any],
    tensors: TensorFile,
    *,
    where: str,
    initial: Path | None = None,
) -> AdapterSource:
    """Return what the config and the tensors say together.

    Args:
        config: the object in `adapter_config.json`.
        tensors: the file beside it.
        where: the directory, for messages.
        initial: where the factors of before the training are, which the caller takes out
            of the result (`peft_initial.py`): then a start that changed the base is read.

    Raises:
        FormatError: the adapter is of another kind, config and tensors disagree, or a
            key or tensor means something that cannot be applied exactly.
    """
    config_where, weights_where = f"{where}/{CONFIG_NAME}", f"{where}/{WEIGHTS_NAME}"
    check_config(config, config_where)
    if initial is None:
        check_start(config, config_where)
    named = sort_out(tensors.header.tensors, weights_where)
    replaced = read_replaced(config, named, tensors, weights_where, config_where)
    budget = Budget()
    updates = _updates(config, named, weights_where, config_where, budget)
    is_tied = ties(config, config_where, budget) and is_held(updates, replaced)
    again = tied_targets(updates, tensors, weights_where) if is_tied else frozenset()
    if again:
        updates = [update for update in updates if update.target not in again]
        replaced = tuple(
            each for each in replaced if each.name.rpartition(".")[0] not in again
        )
    if is_tied:
        check_replaced(replaced, tensors, weights_where)
    modules = [named.keys[u.target] for u in updates if u.layer != "experts"]
    saved = [
        named.keys[each.name].rpartition(".")[0]
        for each in replaced
        if each.role == "modules_to_save"
    ]
    check_targets(config, modules, config_where, saved, budget)
    _check_flags(config, updates, weights_where)
    source = AdapterSource(
        updates=tuple(updates),
        tensors=tensors,
        base_name=config.get("base_model_name_or_path"),
        base_revision=config.get("revision"),
        task_type=config.get("task_type"),
        replacements=replaced,
        alora_tokens=tuple(config.get("alora_invocation_tokens") or ()),
        ties_weights=is_tied,
    )
    for loss in losses_of(source):
        # PEFT itself makes no such thing, or applies another one than it says.
        raise FormatError(f"the files hold {loss}, which is not read", where=where)
    return source


def _updates(
    config: Mapping[str, Any],
    named: Named,
    where: str,
    config_where: str,
    budget: Budget,
) -> list[UpdateSource]:
    """Return the updates in order of their targets."""
    parameters = find_parameters(config, named, where, config_where, budget)
    targets, keys = {}, {}
    for place, parts in named.updates.items():
        last = f".{parameters[place]}" if place in parameters else ""
        targets[place], keys[place] = place[0] + last, parts.key + last
    names = list(keys.values())
    ranks = expand(config, "rank_pattern", "r", DEFAULT_RANK, names, config_where, budget)
    alphas = expand(
        config, "alpha_pattern", "lora_alpha", DEFAULT_ALPHA, names, config_where, budget
    )
    rule: ScalingRule = "alpha/sqrt(r)" if config.get("use_rslora") else "alpha/r"
    return [
        make_update(
            targets[place],
            named.updates[place],
            is_parameter=place in parameters,
            rank=ranks[keys[place]],
            alpha=float(alphas[keys[place]]),
            rule=rule,
            where=where,
        )
        for place in sorted(targets, key=lambda place: targets[place])
    ]


def _check_flags(
    config: Mapping[str, Any], updates: Sequence[UpdateSource], where: str
) -> None:
    """Raise `FormatError` unless flags and tensors agree."""
    flags = (
        ("use_dora", "magnitude", "lora_magnitude_vector"),
        ("lora_bias", "bias", "lora_B.bias"),
    )
    for update in updates:
        for key, attribute, tensor in flags:
            is_said, is_held = bool(config.get(key)), bool(getattr(update, attribute))
            if is_said and not is_held:
                raise FormatError(
                    f"{key} is true, and {update.target} has no {tensor}",
                    where=where,
                    hint="the file is incomplete, or belongs to another config",
                )
            if is_held and not is_said:
                raise FormatError(
                    f"{update.target} has a {tensor}, and the config's {key} is not true: "
                    "PEFT would drop it in silence",
                    where=where,
                )
