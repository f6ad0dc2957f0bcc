"""kohya's sd-scripts: one safetensors file, `lora_unet_….lora_down.weight`, both ways.

A module's path stands in the name with `_` in place of its dots, so which dots they were
only the base's own list of modules tells. `lora_down` is (rank, in), `lora_up`
(out, rank), `alpha` a number of its own beside them; without it alpha is the rank.
LyCORIS writes more kinds of update under such names; they are refused by name.

Source: kohya-ss/sd-scripts 02298e3, `networks/lora.py`.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from lora_hub.errors import FormatError
from lora_hub.formats import base_names, factors
from lora_hub.formats.dialect import Given, Glance, ReadOptions, Written
from lora_hub.formats.factors import Factors, Matrix
from lora_hub.formats.source import AdapterSource
from lora_hub.tensors import arrays
from lora_hub.tensors.file import TensorFile

WEIGHTS_NAME = "lora.safetensors"
SAYS = frozenset({"components", "float64", "ranks", "scalings"})

_NAME = re.compile(r"(lora_unet|lora_te[123]?|lycoris)_([^.]+)\.(.+)")
_FACTORS = {"lora_down.weight": "a", "lora_up.weight": "b"}
_ALPHA = "alpha"

# prefix → component. sd-scripts counts text encoders from 1 where there are several.
_COMPONENTS = {
    "lora_unet": "unet",
    "lora_te": "text_encoder",
    "lora_te1": "text_encoder",
    "lora_te2": "text_encoder_2",
    "lora_te3": "text_encoder_3",
}

# What stands behind the module's name for kinds that are not read → what it is.
_OTHERS = {
    "a1.weight": "GLoRA",
    "diff": "a whole weight (LyCORIS full)",
    "diff_b": "a whole bias (LyCORIS full)",
    "dora_scale": "a magnitude of DoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "lora_mid.": "a convolution in three factors (LoCon with Tucker decomposition)",
    "oft_": "OFT",
    "on_input": "IA3",
    "w_norm": "the weight of a norm",
}


def claim_weights(glance: Glance) -> str | None:
    if glance.header is None or not glance.header.tensors:
        return None
    if not all(_NAME.fullmatch(name) for name in glance.header.tensors):
        return None
    module = glance.header.metadata.get("ss_network_module")
    said = f"; its header names ss_network_module {module!r}" if module else ""
    return f"every tensor is named lora_unet_… or lora_te…{said}"


def read(given: Given, options: ReadOptions) -> AdapterSource:
    """Return the adapter, its targets found in the base's list of modules.

    Raises:
        FormatError: no base was given, a name fits no module of it or several, or a
            tensor is of a kind that is not read yet.
    """
    where = given.weights_where
    tensors = TensorFile.from_bytes(given.weights, where=where)
    found, alphas = [], {}
    for name, tensor in tensors.header.tensors.items():
        match = _NAME.fullmatch(name)
        if match is None or match[1] not in _COMPONENTS:
            whose = "not named as sd-scripts does (lora_unet_…)"
            if match:
                whose = "named as LyCORIS does for other networks, which is not read yet"
            raise FormatError(f"the tensor {name!r} is {whose}", where=where)
        mangled = f"{match[1]}_{match[2]}"
        if match[3] in _FACTORS:
            found.append((mangled, _FACTORS[match[3]], tensor))
        elif match[3] == _ALPHA:
            alphas[mangled] = _alpha(factors.matrix(tensors, tensor), name, where)
        else:
            raise FormatError(_other(name, match[3]), where=where)
    pairs = factors.pair_up(found, where)
    _check_alphas(alphas, pairs, where)
    targets = _unmangle(pairs, options.base, where)
    parts = []
    for mangled, (a, b) in pairs.items():
        whole_a, whole_b = factors.matrix(tensors, a), factors.matrix(tensors, b)
        factors.check_factors(targets[mangled], whole_a, whole_b, where)
        # 0 means the rank to sd-scripts, as if nothing stood there.
        alpha = alphas.get(mangled) or float(whole_a.shape[0])
        parts.append(Factors(targets[mangled], alpha, "alpha/r", whole_a, whole_b))
    return factors.to_source(parts, where=where)


def write(source: AdapterSource, base: Path | None = None) -> Written:
    """Return the file that sd-scripts and the tools around it load.

    Raises:
        LossyConversion: a target is of no component that has a prefix, two targets
            become one name, or a scaling is no float32 alpha over the rank.
    """
    parts = factors.of_source(source)
    components = {base_names.of_component(part.target)[0] for part in parts}
    prefixes = _prefixes(components)
    names, alphas, losses = {}, {}, []
    unsaid = [
        part.target
        for part in parts
        if base_names.of_component(part.target)[0] not in prefixes
    ]
    if unsaid:
        losses.append(
            f"{factors.some(unsaid)} lies in no component it has a prefix for "
            f"({', '.join(sorted(set(_COMPONENTS.values())))})"
        )
    for part in parts:
        component, path = base_names.of_component(part.target)
        names[part.target] = f"{prefixes.get(component, '')}_{path.replace('.', '_')}"
        alpha = factors.float32_alpha(part)
        if alpha:  # 0 would be read as the rank
            alphas[part.target] = alpha
    inexact = [part.target for part in parts if part.target not in alphas]
    if inexact:
        losses.append(
            f"no float32 alpha over the rank is the scaling of {factors.some(inexact)}"
        )
    twice = [name for name, count in Counter(names.values()).items() if count > 1]
    if twice:
        losses.append(f"two targets would both be called {factors.some(sorted(twice))}")
    factors.refuse(losses, "kohya's format")
    tensors: dict[str, Matrix] = {}
    for part in parts:
        name = names[part.target]
        tensors[f"{name}.lora_down.weight"] = part.a
        tensors[f"{name}.lora_up.weight"] = part.b
        tensors[f"{name}.{_ALPHA}"] = _scalar(alphas[part.target])
    metadata = {
        "ss_network_alpha": _common(alphas.values()),
        "ss_network_dim": _common(part.rank for part in parts),
        "ss_network_module": "networks.lora",
    }
    return Written({WEIGHTS_NAME: factors.safetensors(tensors, metadata)})


# ── names ────────────────────────────────────────────────────────────────────────────


def _unmangle(pairs: Iterable[str], base: Path | None, where: str) -> dict[str, str]:
    """Return mangled name → target."""
    if base is None:
        raise FormatError(
            "names of sd-scripts have '_' in place of dots: only the base's list of "
            "modules tells what they mean",
            where=where,
            hint="give the folder of the base with `lorahub convert … --base`",
        )
    known = base_names.modules_of(base)
    meant: dict[str, list[str]] = {}
    for prefix, component in _COMPONENTS.items():
        # A checkpoint that is no pipeline can only be what the file speaks of.
        for path in known.get(component, known.get("", ())):
            name = f"{prefix}_{path.replace('.', '_')}"
            meant.setdefault(name, []).append(f"{component}.{path}")
    targets = {}
    for name in pairs:
        found = meant.get(name, [])
        if not found:
            raise FormatError(_unknown(name, base), where=where)
        if len(found) > 1:
            raise FormatError(
                f"{name} may be {' or '.join(sorted(found))}: the base has both",
                where=where,
            )
        targets[name] = found[0]
    twice = [target for target, count in Counter(targets.values()).items() if count > 1]
    if twice:
        raise FormatError(f"two names mean {twice[0]}", where=where)
    return targets


def _unknown(name: str, base: Path) -> str:
    for prefix in _COMPONENTS:
        if name.startswith(f"{prefix}_{prefix}_"):
            return f"{name} has its prefix twice: a broken conversion"
    return f"the base {base} has no linear layer that sd-scripts would call {name}"


def _prefixes(components: set[str]) -> dict[str, str]:
    """Return component → prefix, as sd-scripts gives it to a model with these."""
    several = bool(components & {"text_encoder_2", "text_encoder_3"})
    first = "lora_te1" if several else "lora_te"
    return {
        "unet": "lora_unet",
        "text_encoder": first,
        "text_encoder_2": "lora_te2",
        "text_encoder_3": "lora_te3",
    }


def _other(name: str, rest: str) -> str:
    for start, what in _OTHERS.items():
        if rest.startswith(start):
            return f"the tensor {name!r} is {what}, which is not read yet"
    return f"the tensor {name!r} is no low-rank factor of sd-scripts"


# ── alphas ───────────────────────────────────────────────────────────────────────────


def _alpha(stored: Matrix, name: str, where: str) -> float:
    import numpy as np

    whole = {"I32": "<i4", "I64": "<i8"}.get(stored.dtype)
    if math.prod(stored.shape) != 1 or not (whole or stored.dtype in arrays.FLOATS):
        raise FormatError(
            f"{name} is {stored.dtype} of shape {list(stored.shape)}, expected one number",
            where=where,
        )
    if whole:
        return float(np.frombuffer(stored.data, dtype=whole)[0])
    alpha = float(arrays.floats(stored.data, stored.dtype, (1,))[0])
    if not math.isfinite(alpha):
        raise FormatError(f"{name} is {alpha}, expected a finite number", where=where)
    return alpha


def _check_alphas(
    alphas: Mapping[str, float], pairs: Mapping[str, object], where: str
) -> None:
    """Raise unless all modules have an alpha, or none: files from before it was stored."""
    alone = sorted(alphas.keys() - pairs.keys())
    if alone:
        raise FormatError(f"{alone[0]} has an alpha and no factors", where=where)
    without = sorted(pairs.keys() - alphas.keys())
    if alphas and without:
        raise FormatError(
            f"{factors.some(without)} has no alpha and other modules have one: a broken "
            "conversion, since alpha would be taken for the rank",
            where=where,
        )


def _scalar(alpha: float) -> Matrix:
    import numpy as np

    return Matrix("F32", (), np.array(alpha, dtype="<f4").tobytes())


def _common(values: Iterable[float]) -> str:
    """Return the one value, or what sd-scripts' own tools write for several."""
    several = {float(value) for value in values}
    if len(several) > 1:
        return "Dynamic"
    (value,) = several
    return f"{value:g}" if value == int(value) else repr(value)
