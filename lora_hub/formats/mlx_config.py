"""What MLX-LM's `adapter_config.json` says: rank, scale, which layers are made ready.

The first versions of MLX-LM multiplied by scale · alpha/rank, and their configs went on
naming an alpha that later ones ignore. Where a config holds both numbers, nobody can tell
from it which version trained, and the caller must say.

Source: ml-explore/mlx-lm 0367286, `mlx_lm/tuner/utils.py`; for the first versions
ml-explore/mlx-examples pull request 623.
"""

import math
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from lora_hub.errors import FormatError
from lora_hub.formats import factors
from lora_hub.formats.dialect import ScaleFrom
from lora_hub.scaling import is_alpha

# The default of `scale` in the versions that multiplied by alpha too.
_OLD_SCALE = 10.0
LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


def check_config(config: Mapping[str, Any], where: str) -> None:
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        named = "whole weights" if kind == "full" else "unknown"
        raise FormatError(
            f"fine_tune_type is {kind!r} ({named}), which is not read yet",
            where=where,
        )


def check_magnitudes(
    config: Mapping[str, Any],
    targets: Collection[str],
    magnitudes: Collection[str],
    where: str,
) -> None:
    """Raise `FormatError` unless magnitudes are there for all targets, or none, as said."""
    is_dora = config.get("fine_tune_type") == "dora"
    alone = sorted(set(magnitudes) - set(targets))
    if alone:
        raise FormatError(f"{alone[0]} has a magnitude and no factors", where=where)
    without = sorted(set(targets) - set(magnitudes))
    if magnitudes and not is_dora:
        raise FormatError(
            f"{min(magnitudes)} has a magnitude, and fine_tune_type is "
            f"{config.get('fine_tune_type', 'lora')!r}",
            where=where,
        )
    if is_dora and without:
        raise FormatError(
            f"fine_tune_type is 'dora', and {factors.some(without)} has no magnitude",
            where=where,
        )


def check_layers(config: Mapping[str, Any], targets: Iterable[str], where: str) -> None:
    """Raise `FormatError` where MLX-LM would drop tensors in silence.

    It makes the last `num_layers` blocks ready for factors, and in them the modules that
    `keys` lists; what else lies in the file it does not load.
    """
    matches = {target: LAYER.fullmatch(target) for target in targets}
    layers = [int(match[1]) for match in matches.values() if match]
    # Until 2024-09 it was called lora_layers.
    key = "num_layers" if "num_layers" in config else "lora_layers"
    count = config.get(key)
    if isinstance(count, int) and count > 0 and layers:
        reach = max(layers) - min(layers) + 1
        if reach > count:
            raise FormatError(
                f"{key} is {count}, and the weights reach over {reach} layers: "
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


def parameters(
    config: Mapping[str, Any], scale_from: ScaleFrom | None, where: str
) -> tuple[int, float]:
    """Return rank, and what multiplies `b @ a`.

    Args:
        config: the object in `adapter_config.json`.
        scale_from: which number holds where the config has an alpha and a scale.
        where: the config, for messages.

    Raises:
        FormatError: it does not say one of them, or both in two ways.
    """
    stated = config.get("lora_parameters")
    if not isinstance(stated, Mapping):
        raise FormatError(
            "lora_parameters is missing or is no object: nothing says rank and scale",
            where=where,
            hint="versions that wrote none kept them in their program: add "
            '"lora_parameters": {"rank": …, "scale": …} as it was trained',
        )
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
            hint="say which with --scale-from scale, or --scale-from alpha",
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
    if not is_alpha(number):
        problem = f"{key} is {value!r}, expected a finite number below 1e150"
        raise FormatError(problem, where=where)
    return number
