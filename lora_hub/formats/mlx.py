"""MLX-LM's directory: `adapter_config.json` and `adapters.safetensors`, both ways.

Factors are stored transposed: `lora_a` (in, rank), `lora_b` (rank, out), under the paths
that modules have in MLX-LM, which for models with `model.layers.N` are those of the
checkpoint. `scale` multiplies `b @ a` directly and is not divided by the rank.

The first versions of MLX-LM multiplied by scale · alpha/rank instead, and their configs
went on naming an alpha that later ones ignore. Where a config holds both numbers, nobody
can tell from it which version trained, and the caller must say.

Source: ml-explore/mlx-lm 0367286, `mlx_lm/tuner/utils.py`, and 200af25, `lora.py`; for the
first versions ml-explore/mlx-examples pull request 623.
"""

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lora_hub import canonical
from lora_hub.errors import FormatError
from lora_hub.formats import factors
from lora_hub.formats.dialect import Given, Glance, ReadOptions, ScaleFrom, Written
from lora_hub.formats.factors import Factors
from lora_hub.formats.source import AdapterSource
from lora_hub.scaling import spell
from lora_hub.tensors.file import TensorFile

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapters.safetensors"
SAYS = frozenset({"alpha64", "language", "rslora"})

_FACTOR = re.compile(r"(.+)\.lora_([ab])")
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_TOP = "lm_head"  # the one layer outside the blocks that keeps its name

# The default of `scale` in the versions that multiplied by alpha too.
_OLD_SCALE = 10.0


def claim_config(config: Mapping[str, Any]) -> str | None:
    keys = [key for key in ("fine_tune_type", "lora_parameters") if key in config]
    return f"{CONFIG_NAME} names {' and '.join(keys)}" if keys else None


def claim_weights(glance: Glance) -> str | None:
    if glance.header is None or not glance.header.tensors:
        return None
    is_ours = all(_FACTOR.fullmatch(name) for name in glance.header.tensors)
    return "every tensor is named ….lora_a or ….lora_b" if is_ours else None


def check_config(config: Mapping[str, Any], where: str) -> None:
    kind = config.get("fine_tune_type", "lora")
    if kind != "lora":
        named = {"dora": "DoRA: the base's weight is scaled too", "full": "whole weights"}
        raise FormatError(
            f"fine_tune_type is {kind!r} ({named.get(kind, 'unknown')}), which is not read "
            "yet",
            where=where,
        )


def read(given: Given, options: ReadOptions) -> AdapterSource:
    """Return what the config and the tensors say together.

    Raises:
        FormatError: the scale is ambiguous or missing, config and tensors disagree, or
            the adapter is of a kind that is not read yet.
    """
    where = given.weights_where
    tensors = TensorFile.from_bytes(given.weights, where=where)
    found = []
    for name, tensor in tensors.header.tensors.items():
        target, which = _parse(name, where)
        found.append((target, which, tensor))
    pairs = factors.pair_up(found, where)
    if not given.config:
        raise FormatError(
            f"there is no {CONFIG_NAME} beside it: without it nobody knows the scale",
            where=where,
        )
    config_where = f"{given.where}/{CONFIG_NAME}"
    stated_rank, scale = _parameters(given.config, options.scale_from, config_where)
    parts = []
    for target, (a, b) in pairs.items():
        whole_a, whole_b = factors.matrix(tensors, a), factors.matrix(tensors, b)
        if len(a.shape) == len(b.shape) == 2:
            whole_a, whole_b = whole_a.transposed(), whole_b.transposed()
        factors.check_factors(target, whole_a, whole_b, where)
        rank = whole_a.shape[0]
        if rank != stated_rank:
            raise FormatError(
                f"{target}: the factors have rank {rank}, {CONFIG_NAME} says {stated_rank}",
                where=where,
            )
        alpha, rule = spell(scale, rank)
        parts.append(Factors(target, alpha, rule, whole_a, whole_b))
    _check_layers(given.config, pairs, config_where)
    model = given.config.get("model")
    return factors.to_source(
        parts, where=where, base_name=model if isinstance(model, str) else None
    )


def write(source: AdapterSource, base: Path | None = None) -> Written:
    """Return the directory that MLX-LM loads.

    `num_layers` is -1: a layer without tensors in the file keeps MLX-LM's fresh factors,
    whose product is zero.

    Raises:
        LossyConversion: ranks or scalings differ, a target has no name that MLX-LM is
            known to use, or factors are float64.
    """
    parts = factors.of_source(source)
    factors.refuse(_losses(parts), "MLX-LM")
    keys = set()
    for part in parts:
        layer = _LAYER.fullmatch(part.target)
        keys.add(layer[2] if layer else part.target)
    config = {
        "fine_tune_type": "lora",
        "lora_parameters": {
            "dropout": 0.0,
            "keys": sorted(keys),
            "rank": parts[0].rank,
            "scale": parts[0].scaling,
        },
        "num_layers": -1,
    }
    tensors = {
        f"{part.target}.lora_{which}": whole.transposed()
        for part in parts
        for which, whole in (("a", part.a), ("b", part.b))
    }
    files = {
        CONFIG_NAME: (canonical.encode(config),),
        WEIGHTS_NAME: factors.safetensors(tensors, {}),
    }
    return Written(files)


def _losses(parts: list[Factors]) -> list[str]:
    losses = []
    ranks = sorted({part.rank for part in parts})
    if len(ranks) > 1:
        losses.append(f"one rank for all targets, these have {ranks}")
    scalings = sorted({part.scaling for part in parts})
    if len(scalings) > 1:
        losses.append(f"one scale for all targets, these have {scalings}")
    unnamed = [
        part.target
        for part in parts
        if not _LAYER.fullmatch(part.target) and part.target != _TOP
    ]
    if unnamed:
        losses.append(
            f"what it calls {factors.some(unnamed)} is not known (known: model.layers.N.…)"
        )
    if any(part.a.dtype == "F64" for part in parts):
        losses.append("factors in float64, which its devices do not have")
    return losses


def _parse(name: str, where: str) -> tuple[str, str]:
    """Return target and "a" or "b"."""
    match = _FACTOR.fullmatch(name)
    if match is None:
        what = "a magnitude of DoRA" if name.endswith(".m") else "no low-rank factor"
        raise FormatError(f"the tensor {name!r} is {what}; not read yet", where=where)
    return match[1], match[2]


def _check_layers(config: Mapping[str, Any], targets: Iterable[str], where: str) -> None:
    """Raise `FormatError` where MLX-LM would drop tensors in silence.

    It makes the last `num_layers` blocks ready for factors, and in them the modules that
    `keys` lists; what else lies in the file it does not load.
    """
    matches = {target: _LAYER.fullmatch(target) for target in targets}
    layers = [int(match[1]) for match in matches.values() if match]
    count = config.get("num_layers")
    if isinstance(count, int) and count > 0 and layers:
        reach = max(layers) - min(layers) + 1
        if reach > count:
            raise FormatError(
                f"num_layers is {count}, and the weights reach over {reach} layers: "
                "MLX-LM would drop some in silence",
                where=where,
            )
    keys = config["lora_parameters"].get("keys")
    for target, match in matches.items() if isinstance(keys, list) else ():
        if target not in keys and (match is None or match[2] not in keys):
            raise FormatError(
                f"the weights hold {target}, which keys leaves out: MLX-LM would drop it "
                "in silence",
                where=where,
            )


def _parameters(
    config: Mapping[str, Any], scale_from: ScaleFrom | None, where: str
) -> tuple[int, float]:
    """Return rank, and what multiplies `b @ a`."""
    stated = config.get("lora_parameters")
    if not isinstance(stated, Mapping):
        raise FormatError("lora_parameters is missing or is no object", where=where)
    where = f"{where}#/lora_parameters"
    rank = stated.get("rank")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise FormatError(f"rank is {rank!r}, expected an integer above 0", where=where)
    alpha, scale = (_number(stated, key, where) for key in ("alpha", "scale"))
    if alpha is None and scale is None:
        raise FormatError("names no scale", where=where)
    if alpha is None:
        assert scale is not None  # one of the two is there
        return rank, scale
    if scale_from is None:
        direct = "none" if scale is None else f"{scale:g}"
        old = (_OLD_SCALE if scale is None else scale) * (alpha / rank)
        raise FormatError(
            f"alpha is {alpha:g} and scale {direct}: MLX-LM today multiplies by scale "
            f"({direct}), its first versions by scale · alpha/rank ({old:g}), and nothing "
            "here says which of them trained this",
            where=where,
            hint="say which with `lorahub convert … --scale-from scale` or `alpha`",
        )
    if scale_from == "alpha":
        return rank, (_OLD_SCALE if scale is None else scale) * (alpha / rank)
    if scale is None:
        raise FormatError("names no scale, only alpha", where=where)
    return rank, scale


def _number(stated: Mapping[str, Any], key: str, where: str) -> float | None:
    value = stated.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise FormatError(f"{key} is {value!r}, expected a number", where=where)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise FormatError(f"{key} is {value!r}, expected a finite number", where=where)
    return number
