"""diffusers' `pytorch_lora_weights.safetensors`: three layouts read, PEFT's names written.

    unet.<module>.lora_A.weight                       PEFT's names
    unet.<module>.lora.down.weight                    and ….lora_linear_layer.down.weight
    unet.<…attn1>.processor.to_q_lora.down.weight     attention processors, before 2023-09

The first part is the component of the pipeline; it stays the first part of the target.
Alphas lie in the header as PEFT's config, or as tensors `<module>.alpha`, or nowhere:
then diffusers takes the rank.

Source: huggingface/diffusers 0023a2c, `utils/state_dict_utils.py`, and 005627e,
`loaders/lora_base.py`; `lora_adapter_metadata` since its pull request 11324.
"""

import json
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from lora_hub import strict_json
from lora_hub.errors import FormatError
from lora_hub.formats import base_names, factors, peft, peft_config
from lora_hub.formats.dialect import Given, Glance, ReadOptions, Written
from lora_hub.formats.factors import Factors, Matrix
from lora_hub.formats.source import AdapterSource
from lora_hub.scaling import ScalingRule
from lora_hub.tensors import arrays
from lora_hub.tensors.file import TensorFile
from lora_hub.tensors.header import TensorInfo
from lora_hub.tensors.write import TORCH_METADATA

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
METADATA_KEY = "lora_adapter_metadata"
SAYS = frozenset({"alpha64", "components", "float64", "ranks", "rslora", "scalings"})

_LAYOUTS = (
    re.compile(r"(?P<module>.+)\.lora_(?P<which>[AB])\.weight"),
    re.compile(r"(?P<module>.+)\.lora(?:_linear_layer)?\.(?P<which>down|up)\.weight"),
    re.compile(
        r"(?P<module>.+)\.(?P<part>to_(?:q|k|v|out))_lora\.(?P<which>down|up)\.weight"
    ),
)
_WHICH = {"A": "a", "B": "b", "down": "a", "up": "b"}
_ALPHA = re.compile(r"(.+)\.alpha")
_PROCESSOR = re.compile(r"\.processor(?=\.|$)")

# What attention processors called the layers of a U-Net, and of a text encoder.
_PARTS = {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out": "to_out.0"}
_TEXT_PARTS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}

_OTHERS = {
    "lora_magnitude_vector": "a magnitude of DoRA",
    "dora_scale": "a magnitude of DoRA",
    "lora_B.bias": "a bias beside the factors",
}


def claim_weights(glance: Glance) -> str | None:
    if glance.header is None or not glance.header.tensors:
        return None
    names = glance.header.tensors.keys()
    if METADATA_KEY in glance.header.metadata:
        return f"its header holds {METADATA_KEY}"
    if all(base_names.of_component(name)[0] for name in names):
        return "every tensor begins with a component of a pipeline (unet., text_encoder.)"
    if all(_LAYOUTS[2].fullmatch(name) for name in names):
        return "every tensor is of an attention processor (….processor.to_q_lora.…)"
    return None


def read(given: Given, options: ReadOptions) -> AdapterSource:
    """Return the adapter; a file without components is one of a U-Net.

    Raises:
        FormatError: nothing says the scalings of modules of unlike ranks, header and
            tensors disagree, or a tensor is of a kind that is not read yet.
    """
    where = given.weights_where
    tensors = TensorFile.from_bytes(given.weights, where=where)
    found = []
    alphas: dict[str, float] = {}
    for name, tensor in tensors.header.tensors.items():
        alpha = _ALPHA.fullmatch(name)
        if alpha:
            target = _whole(alpha[1])
            if target in alphas:
                raise FormatError(f"two tensors are alphas of {target}", where=where)
            alphas[target] = _number(tensors, tensor, where)
        else:
            target, which = _parse(name, where)
            found.append((target, which, tensor))
    pairs = factors.pair_up(found, where)
    wholes = {}
    for target, (a, b) in pairs.items():
        wholes[target] = (factors.matrix(tensors, a), factors.matrix(tensors, b))
        factors.check_factors(target, *wholes[target], where)
    ranks = {target: a.shape[0] for target, (a, _) in wholes.items()}
    configs = _configs(tensors.header.metadata, where)
    if configs and alphas:
        raise FormatError(
            f"the header holds {METADATA_KEY}, and the tensors hold alphas too", where=where
        )
    alone = sorted(alphas.keys() - pairs.keys())
    if alone:
        raise FormatError(f"{alone[0]} has an alpha and no factors", where=where)
    said: dict[str, tuple[float, ScalingRule]] = {}
    for component, targets in base_names.by_component(pairs).items():
        own = {target: ranks[target] for target in targets}
        if component in configs:
            at = f"{where}#/__metadata__/{METADATA_KEY}/{component}"
            said |= _from_config(configs[component], own, at)
        else:
            said |= _from_alphas(alphas, own, where)
    parts = [Factors(target, *said[target], *wholes[target]) for target in pairs]
    return factors.to_source(parts, where=where, base_name=_base_name(configs))


def write(source: AdapterSource, base: Path | None = None) -> Written:
    """Return the file that `load_lora_weights` takes, PEFT's config in its header.

    Raises:
        LossyConversion: a target is in no component of a pipeline.
    """
    parts = {part.target: part for part in factors.of_source(source)}
    grouped = base_names.by_component(parts)
    losses = []
    if "" in grouped:
        losses.append(
            f"{factors.some(grouped[''])} lies in no component of a pipeline "
            f"({', '.join(base_names.COMPONENTS)})"
        )
    factors.refuse(losses, "diffusers")
    metadata: dict[str, Any] = {}
    for component, targets in grouped.items():
        own = {
            base_names.of_component(target)[1]: (parts[target].rank, parts[target].alpha)
            for target in targets
        }
        config = peft.build_config(own, parts[targets[0]].rule)
        metadata |= {f"{component}.{key}": value for key, value in config.items()}
    tensors = {
        f"{target}.lora_{which}.weight": whole
        for target, part in parts.items()
        for which, whole in (("A", part.a), ("B", part.b))
    }
    header = {
        **TORCH_METADATA,
        METADATA_KEY: json.dumps(metadata, indent=2, sort_keys=True),
    }
    return Written({WEIGHTS_NAME: factors.safetensors(tensors, header)})


# ── names ────────────────────────────────────────────────────────────────────────────


def _parse(name: str, where: str) -> tuple[str, str]:
    """Return target and "a" or "b"."""
    # The processors' layout first: to_q_lora is no module of the second one.
    for layout in reversed(_LAYOUTS):
        match = layout.fullmatch(name)
        if match:
            module = _whole(match["module"])
            part = match.groupdict().get("part")
            if part:
                names = _TEXT_PARTS if module.startswith("text_encoder") else _PARTS
                module = f"{module}.{names[part]}"
            return module, _WHICH[match["which"]]
    for suffix, what in _OTHERS.items():
        if name.removesuffix(".weight").endswith(f".{suffix}"):
            raise FormatError(
                f"the tensor {name!r} is {what}, which is not read yet", where=where
            )
    raise FormatError(
        f"the tensor {name!r} is no low-rank factor of diffusers, in none of its layouts",
        where=where,
    )


def _whole(module: str) -> str:
    """Return the path with its component and without the processor, which is no module."""
    module = _PROCESSOR.sub("", module)
    return module if base_names.of_component(module)[0] else f"unet.{module}"


# ── scalings ─────────────────────────────────────────────────────────────────────────


def _configs(metadata: Mapping[str, str], where: str) -> dict[str, dict[str, Any]]:
    """Return component → PEFT's config of it, from the header."""
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
    return configs


def _from_config(
    config: Mapping[str, Any], ranks: Mapping[str, int], where: str
) -> dict[str, tuple[float, ScalingRule]]:
    """Return target → alpha and rule, as PEFT reads the config of one component."""
    keys = {target: base_names.of_component(target)[1] for target in ranks}
    paths = list(keys.values())
    peft_config.check_targets(config, paths, where)
    stated = peft_config.expand(
        config, "rank_pattern", "r", peft_config.DEFAULT_RANK, paths, where
    )
    alphas = peft_config.expand(
        config, "alpha_pattern", "lora_alpha", peft_config.DEFAULT_ALPHA, paths, where
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
    if without and len(set(ranks.values())) > 1:
        raise FormatError(
            f"the ranks are {sorted(set(ranks.values()))} and nothing says an alpha: what "
            "diffusers takes for it depends on the order of its modules",
            where=where,
        )
    return {
        target: (alphas.get(target, float(rank)), "alpha/r")
        for target, rank in ranks.items()
    }


def _number(tensors: TensorFile, tensor: TensorInfo, where: str) -> float:
    stored: Matrix = factors.matrix(tensors, tensor)
    if math.prod(stored.shape) != 1 or stored.dtype not in arrays.FLOATS:
        raise FormatError(
            f"{tensor.name} is {stored.dtype} of shape {list(stored.shape)}, expected one "
            "number",
            where=where,
        )
    alpha = float(arrays.floats(stored.data, stored.dtype, (1,))[0])
    if not math.isfinite(alpha):
        raise FormatError(
            f"{tensor.name} is {alpha}, expected a finite number", where=where
        )
    return alpha


def _base_name(configs: Mapping[str, Mapping[str, Any]]) -> str | None:
    names: Collection[Any] = {
        config.get("base_model_name_or_path") for config in configs.values()
    } - {None}
    return next(iter(names)) if len(names) == 1 else None
