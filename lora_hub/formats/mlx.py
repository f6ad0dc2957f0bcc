"""MLX-LM's directory: `adapter_config.json` and `adapters.safetensors`, both ways.

Factors are stored transposed: `lora_a` (in, rank), `lora_b` (rank, out), under the paths
that modules have in MLX-LM, which for models with `model.layers.N` are those of the
checkpoint. `scale` multiplies `b @ a` directly and is not divided by the rank. DoRA's
magnitude is `m` (out). Experts have three axes, `lora_a` (experts, rank, in) and `lora_b`
(experts, out, rank), under MLX's own names (`….switch_mlp.gate_proj`), which no checkpoint
of transformers has: such an adapter fits bases that were converted to MLX.

An update of the input embedding changes a tied output too, so it is told as such
(`ties_weights`), unless the base that was given has an output layer of its own.

What the config says, `mlx_config.py` tells.

Source: ml-explore/mlx-lm 0367286, `mlx_lm/tuner/utils.py`, and 200af25, `lora.py`; for
DoRA, embeddings and experts `mlx_lm/tuner/dora.py` and `lora.py`.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_hub import canonical
from lora_hub.errors import FormatError
from lora_hub.formats import base_names, factors, layers, losses
from lora_hub.formats.dialect import Given, Glance, ReadOptions, Written
from lora_hub.formats.factors import Factors
from lora_hub.formats.files import CONFIG_NAME
from lora_hub.formats.matrices import Matrix, join_experts, split_experts
from lora_hub.formats.mlx_config import (
    LAYER,
    check_layers,
    check_magnitudes,
    parameters,
)
from lora_hub.formats.source import AdapterSource
from lora_hub.scaling import spell
from lora_hub.tensors.file import TensorFile
from lora_hub.tensors.header import TensorInfo

WEIGHTS_NAME = "adapters.safetensors"
SAYS = frozenset({"alpha64", "dora", "embeddings", "experts", "language", "rslora", "ties"})

_FACTOR = re.compile(r"(.+)\.lora_([ab])")
_MAGNITUDE = re.compile(r"(.+)\.m")
# What MLX-LM calls a layer of experts, whatever the model.
_EXPERTS = re.compile(r".+\.switch_(?:mlp|glu)\.(?:gate|up|down)_proj")
# The layers outside the blocks that keep their names.
_EMBEDDING = "model.embed_tokens"
_TOP = frozenset({"lm_head", _EMBEDDING})


def claim_config(config: Mapping[str, Any]) -> str | None:
    keys = [
        key for key in ("fine_tune_type", "lora_parameters", "lora_layers") if key in config
    ]
    return f"{CONFIG_NAME} names {' and '.join(keys)}" if keys else None


def claim_weights(glance: Glance) -> str | None:
    if glance.header is None or not glance.header.tensors:
        return None
    is_ours = all(
        _FACTOR.fullmatch(name) or _MAGNITUDE.fullmatch(name)
        for name in glance.header.tensors
    ) and any(_FACTOR.fullmatch(name) for name in glance.header.tensors)
    return "every tensor is named ….lora_a or ….lora_b" if is_ours else None


def read(given: Given, options: ReadOptions) -> AdapterSource:
    """Return what the config and the tensors say together.

    Raises:
        FormatError: the scale is ambiguous or missing, config and tensors disagree, or
            the adapter is of a kind that is not read yet.
    """
    where = given.weights_where
    tensors = TensorFile.from_bytes(given.weights, where=where)
    found = []
    magnitudes: dict[str, TensorInfo] = {}
    for name, tensor in tensors.header.tensors.items():
        target, which = _parse(name, where)
        if which == "m":
            magnitudes[target] = tensor
        else:
            found.append((target, which, tensor))
    pairs = factors.pair_up(found, where)
    if not given.config:
        raise FormatError(
            f"there is no {CONFIG_NAME} beside it: without it nobody knows the scale",
            where=where,
        )
    config_where = f"{given.where}/{CONFIG_NAME}"
    check_magnitudes(given.config, pairs, magnitudes, config_where)
    stated_rank, scale = parameters(given.config, options.scale_from, config_where)
    parts = []
    for target, pair in pairs.items():
        part = _part(tensors, target, pair, magnitudes.get(target), where)
        if part.rank != stated_rank:
            raise FormatError(
                f"{target}: the factors have rank {part.rank}, {CONFIG_NAME} says "
                f"{stated_rank}",
                where=where,
            )
        alpha, rule = spell(scale, part.rank)
        parts.append(replace(part, alpha=alpha, rule=rule))
    check_layers(given.config, pairs, config_where)
    model = given.config.get("model")
    source = factors.to_source(
        parts, where=where, base_name=model if isinstance(model, str) else None
    )
    return replace(
        source, ties_weights=_EMBEDDING in pairs and not _is_untied(options.base)
    )


def write(source: AdapterSource, base: Path | None = None) -> Written:
    """Return the directory that MLX-LM loads.

    `num_layers` is -1: a layer without tensors in the file keeps MLX-LM's fresh factors,
    whose product is zero.

    Raises:
        LossyConversion: ranks or scalings differ, a target has no name that MLX-LM is
            known to use, factors are float64, or the adapter holds what is no update of a
            linear layer, an embedding or experts.
    """
    parts = factors.of_source(source)
    factors.refuse(
        losses.beyond(source, SAYS)
        + losses.partly(source, "dora")
        + _tying(source, base)
        + _losses(parts),
        "MLX-LM",
    )
    keys = set()
    for part in parts:
        module = _module(part)
        layer = LAYER.fullmatch(module)
        keys.add(layer[2] if layer else module)
    config = {
        "fine_tune_type": "dora" if parts[0].magnitude else "lora",
        "lora_parameters": {
            "dropout": 0.0,
            "keys": sorted(keys),
            "rank": parts[0].rank,
            "scale": parts[0].scaling,
        },
        "num_layers": -1,
    }
    tensors: dict[str, Matrix] = {}
    for part in parts:
        a, b = part.a.transposed(), part.b.transposed()
        if part.layer == "experts":
            a, b = split_experts(part.a, part.b, part.experts)
        tensors |= {f"{_module(part)}.lora_a": a, f"{_module(part)}.lora_b": b}
        if part.magnitude:
            tensors[f"{_module(part)}.m"] = part.magnitude
    files = {
        CONFIG_NAME: (canonical.encode(config),),
        WEIGHTS_NAME: factors.safetensors(tensors, {}),
    }
    return Written(files)


def _part(
    tensors: TensorFile,
    target: str,
    pair: tuple[TensorInfo, TensorInfo],
    magnitude: TensorInfo | None,
    where: str,
) -> Factors:
    """Return a target's factors, their scaling still to be found."""
    a, b = (factors.matrix(tensors, tensor) for tensor in pair)
    found = Factors(target, 1.0, "alpha/r", a, b)
    if len(a.shape) == len(b.shape) == 3 and _EXPERTS.fullmatch(target):
        if a.shape[0] != b.shape[0] or a.shape[1] != b.shape[2] or 0 in a.shape + b.shape:
            raise FormatError(
                f"{target}: the factors are {list(a.shape)} and {list(b.shape)}; expected "
                "[experts, rank, in] and [experts, out, rank]",
                where=where,
            )
        a, b, experts = *join_experts(a, b), a.shape[0]
        # The base's tensor, since to everyone else experts are a parameter.
        weight = f"{target}.weight"
        found = Factors(weight, 1.0, "alpha/r", a, b, layer="experts", experts=experts)
    elif len(a.shape) == len(b.shape) == 2:
        a, b = a.transposed(), b.transposed()
        layer = layers.layer_of(target, a)
        found = Factors(target, 1.0, "alpha/r", a, b, layer=layer)
    if magnitude:
        if found.layer != "linear":
            raise FormatError(
                f"{target}: MLX-LM's DoRA of an embedding has a magnitude for each token, "
                "another method than PEFT's, and not read",
                where=where,
            )
        found = replace(found, magnitude=factors.matrix(tensors, magnitude))
    layers.check_factors(found, where)
    return found


def _module(part: Factors) -> str:
    """Return the module whose update it is; experts are told by their weight."""
    return part.target.removesuffix(".weight") if part.layer == "experts" else part.target


def _is_named(part: Factors) -> bool:
    module = _module(part)
    if part.layer == "experts":
        is_weight = part.target.endswith(".weight")
        return is_weight and bool(LAYER.fullmatch(module) and _EXPERTS.fullmatch(module))
    return bool(LAYER.fullmatch(module)) or module in _TOP


def _is_untied(base: Path | None) -> bool:
    """Return whether the base is known to have an output layer of its own."""
    return base is not None and not base_names.is_tied(base)


def _tying(source: AdapterSource, base: Path | None) -> list[str]:
    """Return a loss where the adapter says of tied embeddings what MLX-LM does not do."""
    changes_embedding = any(u.target == _EMBEDDING for u in source.updates)
    if changes_embedding and not source.ties_weights and not _is_untied(base):
        loss = f"an update of {_EMBEDDING} alone: it changes a tied output layer too"
        return [f"{loss} (give the base, if it has an output layer of its own)"]
    if source.ties_weights and not changes_embedding:
        return ["tied embeddings without an update of the embedding"]
    return []


def _losses(parts: list[Factors]) -> list[str]:
    found = []
    ranks = sorted({part.rank for part in parts})
    if len(ranks) > 1:
        found.append(f"one rank for all targets, these have {ranks}")
    scalings = sorted({part.scaling for part in parts})
    if len(scalings) > 1:
        found.append(f"one scale for all targets, these have {scalings}")
    unnamed = [part.target for part in parts if not _is_named(part)]
    if unnamed:
        found.append(
            f"what it calls {factors.some(unnamed)} is not known (known: model.layers.N.…)"
        )
    embedded = [p.target for p in parts if p.layer == "embedding" and p.magnitude]
    if embedded:
        found.append(
            f"DoRA with a magnitude for each dimension of {factors.some(embedded)}, where "
            "it has one for each token"
        )
    if any(part.a.dtype == "F64" for part in parts):
        found.append("factors in float64, which its devices do not have")
    return found


def _parse(name: str, where: str) -> tuple[str, str]:
    """Return target and "a", "b" or "m"."""
    match = _FACTOR.fullmatch(name)
    if match:
        return match[1], match[2]
    match = _MAGNITUDE.fullmatch(name)
    if match:
        return match[1], "m"
    raise FormatError(f"the tensor {name!r} is no low-rank factor; not read", where=where)
