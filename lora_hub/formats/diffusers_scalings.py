"""What a file of diffusers says about scalings: a config in its header, alphas, or nothing.

The header's config is PEFT's, its keys behind the component's name (`unet.lora_alpha`).

Source: huggingface/diffusers 005627e, `loaders/lora_base.py`; `lora_adapter_metadata`
since its pull request 11324.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

from lora_hub import strict_json
from lora_hub.errors import FormatError
from lora_hub.formats import base_names, factors, flux, peft_config, peft_targets
from lora_hub.formats.factors import Factors
from lora_hub.formats.matrices import Matrix
from lora_hub.formats.patterns import Budget
from lora_hub.scaling import ScalingRule, is_alpha
from lora_hub.tensors import arrays
from lora_hub.tensors.file import TensorFile
from lora_hub.tensors.header import TensorInfo

METADATA_KEY = "lora_adapter_metadata"

# Keys of PEFT's config whose tensors diffusers does not load.
_BEYOND = (
    "alora_invocation_tokens",
    "bias",
    "ensure_weight_tying",
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
)


def applied(
    parts: Mapping[str, Factors],
    configs: Mapping[str, Mapping[str, Any]],
    alphas: Mapping[str, float],
    where: str,
) -> list[Factors]:
    """Return the parts with their alphas, as header or tensors say them.

    Raises:
        FormatError: both say them, or neither where that would be a guess.
    """
    if configs and alphas:
        raise FormatError(
            f"the header holds {METADATA_KEY}, and the tensors hold alphas too", where=where
        )
    said: dict[str, tuple[float, ScalingRule]] = {}
    budget = Budget()  # for all components: they are of one header
    for component, targets in base_names.by_component(parts).items():
        own = {target: parts[target] for target in targets}
        ranks = {target: part.rank for target, part in own.items()}
        if component in configs:
            at = f"{where}#/__metadata__/{METADATA_KEY}/{component}"
            said |= _from_config(configs[component], ranks, at, budget)
            _check_kind(configs[component], own.values(), at)
        else:
            said |= _from_alphas(alphas, ranks, where)
    return [
        replace(part, alpha=said[target][0], rule=said[target][1])
        for target, part in parts.items()
    ]


def configs_of(metadata: Mapping[str, str], where: str) -> dict[str, dict[str, Any]]:
    """Return component → PEFT's config of it, from the header; {} where it has none.

    Raises:
        FormatError: a key is of no component, or a config is not one that is read.
    """
    if METADATA_KEY not in metadata:
        return {}
    at = f"{where}#/__metadata__/{METADATA_KEY}"
    stated = strict_json.decode_object(metadata[METADATA_KEY].encode(), where=at)
    configs: dict[str, dict[str, Any]] = {}
    for key, value in stated.items():
        component, name = base_names.of_component(key)
        if not component:
            raise FormatError(f"the key {key!r} names no component", where=at)
        configs.setdefault(component, {"peft_type": "LORA"})[name] = value
    for component, config in configs.items():
        peft_config.check_config(config, f"{at}/{component}")
        peft_config.check_start(config, f"{at}/{component}")
        _check_beyond(config, f"{at}/{component}")
    return configs


def _from_config(
    config: Mapping[str, Any], ranks: Mapping[str, int], where: str, budget: Budget
) -> dict[str, tuple[float, ScalingRule]]:
    """Return target → alpha and rule, as PEFT reads the config of one component."""
    keys = {target: base_names.of_component(target)[1] for target in ranks}
    paths = list(keys.values())
    peft_targets.check_targets(config, paths, where, budget=budget)
    stated = peft_targets.expand(
        config, "rank_pattern", "r", peft_config.DEFAULT_RANK, paths, where, budget
    )
    alphas = peft_targets.expand(
        config,
        "alpha_pattern",
        "lora_alpha",
        peft_config.DEFAULT_ALPHA,
        paths,
        where,
        budget,
    )
    rule: ScalingRule = "alpha/sqrt(r)" if config.get("use_rslora") else "alpha/r"
    for target, rank in ranks.items():
        if stated[keys[target]] != rank:
            raise FormatError(
                f"{target}: the factors have rank {rank}, the header says "
                f"{stated[keys[target]]}",
                where=where,
            )
    return {target: (float(alphas[keys[target]]), rule) for target in ranks}


def _from_alphas(
    alphas: Mapping[str, float], ranks: Mapping[str, int], where: str
) -> dict[str, tuple[float, ScalingRule]]:
    """Return target → alpha as its tensor says; of the rank where no tensor says any."""
    without = sorted(ranks.keys() - alphas.keys())
    if len(without) not in (0, len(ranks)):
        raise FormatError(
            f"{factors.some(without)} has no alpha and other modules have one: the file is "
            "incomplete",
            where=where,
        )
    # Of FLUX.1 in BFL's names, every tool takes the rank of each module.
    own = {
        rank
        for target, rank in ranks.items()
        if not flux.is_block(base_names.of_component(target)[1])
    }
    if without and len(own) > 1:
        raise FormatError(
            f"the ranks are {sorted(set(ranks.values()))} and nothing says an alpha: what "
            "diffusers takes for it depends on the order of its modules",
            where=where,
        )
    return {
        target: (alphas.get(target, float(rank)), "alpha/r")
        for target, rank in ranks.items()
    }


def number(tensors: TensorFile, tensor: TensorInfo, where: str) -> float:
    """Return the alpha in a tensor of one number; `FormatError` if it holds none."""
    stored: Matrix = factors.matrix(tensors, tensor)
    if math.prod(stored.shape) != 1 or stored.dtype not in arrays.FLOATS:
        raise FormatError(
            f"{tensor.name} is {stored.dtype} of shape {list(stored.shape)}, expected one "
            "number",
            where=where,
        )
    alpha = float(arrays.floats(stored.data, stored.dtype, (1,))[0])
    if not is_alpha(alpha):
        problem = f"{tensor.name} is {alpha}, expected a finite number below 1e150"
        raise FormatError(problem, where=where)
    return alpha


def base_name(configs: Mapping[str, Mapping[str, Any]]) -> str | None:
    names: Collection[Any] = {
        config.get("base_model_name_or_path") for config in configs.values()
    } - {None}
    return next(iter(names)) if len(names) == 1 else None


def _check_kind(config: Mapping[str, Any], parts: Iterable[Factors], where: str) -> None:
    """Raise `FormatError` where header and tensors disagree about DoRA or biases."""
    for part in parts:
        for key, held in (("use_dora", part.magnitude), ("lora_bias", part.bias)):
            if bool(config.get(key)) != (held is not None):
                has = "no tensor for it" if held is None else "a tensor for it"
                raise FormatError(
                    f"{part.target} has {has}, the header says {key}="
                    f"{config.get(key, False)!r}",
                    where=where,
                )


def _check_beyond(config: Mapping[str, Any], where: str) -> None:
    for key in _BEYOND:
        value = config.get(key)
        if value and value != "none":
            raise FormatError(
                f"the header says {key}={value!r}, which diffusers does not load",
                where=where,
            )
