"""kohya's sd-scripts, and LyCORIS: one safetensors file, both ways.

Every tensor is named `lora_unet_<module>.<part>`, and which module that is, the base
tells (`kohya_names.py`). `lora_down` is (rank, in, …), `lora_up` (out, rank, …), `alpha` a
number of its own beside them; without it alpha is the rank. What the parts of a module
mean, `lycoris.py` tells.

Source: kohya-ss/sd-scripts 02298e3, `networks/lora.py`.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from lora_hub.errors import FormatError
from lora_hub.formats import base_names, factors, flux, kohya_names, losses, lycoris
from lora_hub.formats.dialect import Given, Glance, ReadOptions, Written
from lora_hub.formats.factors import Factors
from lora_hub.formats.matrices import Matrix
from lora_hub.formats.products import MAX_BYTES
from lora_hub.formats.source import AdapterSource
from lora_hub.scaling import is_alpha
from lora_hub.tensors import arrays
from lora_hub.tensors.file import TensorFile

WEIGHTS_NAME = "lora.safetensors"
SAYS = frozenset({"components", "convolutions", "dora", "float64", "ranks", "scalings"})

_NAME = re.compile(r"(lora_unet|lora_te[123]?|lycoris)_([^.]+)\.(.+)")


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
            tensor is of a kind that is not read.
    """
    where = given.weights_where
    tensors = TensorFile.from_bytes(given.weights, where=where)
    found: dict[str, dict[str, Matrix]] = {}
    alphas = {}
    for name, tensor in tensors.header.tensors.items():
        match = _NAME.fullmatch(name)
        if match is None:
            raise FormatError(
                f"the tensor {name!r} is not named as sd-scripts does (lora_unet_…)",
                where=where,
            )
        mangled = f"{match[1]}_{match[2]}"
        if match[3] == lycoris.ALPHA:
            alphas[mangled] = _alpha(factors.matrix(tensors, tensor), name, where)
        elif match[3] in lycoris.KNOWN:
            found.setdefault(mangled, {})[match[3]] = factors.matrix(tensors, tensor)
        else:
            said = lycoris.describe(f"the tensor {name!r}", match[3])
            raise FormatError(said, where=where)
    if not found:
        raise FormatError("the file holds no factors", where=where)
    _check_alphas(alphas, found, where)
    meant = kohya_names.meanings(found, options.base, where)
    parts: list[Factors] = []
    of_flux: list[Factors] = []
    size = 0
    for mangled, held in found.items():
        target, shape = meant[mangled]
        # 0 means the rank to sd-scripts, as if nothing stood there.
        alpha = alphas.get(mangled) or None
        part = lycoris.update_of(lycoris.Module(target, shape, held, alpha, where))
        size += len(part.a.data) + len(part.b.data)
        if size > len(given.weights) + MAX_BYTES:
            raise FormatError(
                f"as low-rank factors it takes more than {MAX_BYTES >> 30} GiB", where=where
            )
        if flux.is_block(target):
            of_flux += flux.in_diffusers(part, where)
        else:
            parts.append(part)
    if of_flux and options.base:
        kohya_names.check_in_base((part.target for part in of_flux), options.base, where)
    parts += of_flux
    kohya_names.check_distinct((part.target for part in parts), where)
    return factors.to_source(parts, where=where)


def write(source: AdapterSource, base: Path | None = None) -> Written:
    """Return the file that sd-scripts and the tools around it load.

    Raises:
        LossyConversion: a target is of no component that has a prefix, two targets
            become one name, a scaling is no float32 alpha over the rank, or the adapter
            holds what is no low-rank update of a linear layer or a convolution.
    """
    parts = factors.of_source(source)
    names = _names(parts)
    alphas: dict[str, float] = {}
    for part in parts:
        alpha = factors.float32_alpha(part)
        if alpha:  # 0 would be read as the rank
            alphas[part.target] = alpha
    factors.refuse(
        losses.beyond(source, SAYS) + _losses(parts, names, alphas), "kohya's format"
    )
    tensors: dict[str, Matrix] = {}
    for part in parts:
        name = names[part.target]
        tensors[f"{name}.lora_down.weight"] = part.a
        tensors[f"{name}.lora_up.weight"] = part.b
        tensors[f"{name}.{lycoris.ALPHA}"] = _scalar(alphas[part.target])
        if part.magnitude:
            ones = (1,) * (len(part.a.shape) - 1)
            magnitude = part.magnitude.shaped((part.b.shape[0], *ones))
            tensors[f"{name}.{lycoris.MAGNITUDE}"] = magnitude
    # sd-scripts by itself knows no magnitude, LyCORIS does.
    is_dora = any(part.magnitude for part in parts)
    metadata = {
        "ss_network_alpha": _common(alphas.values()),
        "ss_network_dim": _common(part.rank for part in parts),
        "ss_network_module": "lycoris.kohya" if is_dora else "networks.lora",
    }
    return Written({WEIGHTS_NAME: factors.safetensors(tensors, metadata)})


def _names(parts: Sequence[Factors]) -> dict[str, str]:
    """Return target → mangled name; without a prefix where its component has none."""
    components = {base_names.of_component(part.target)[0] for part in parts}
    prefixes = kohya_names.prefixes(components)
    names = {}
    for part in parts:
        component, path = base_names.of_component(part.target)
        names[part.target] = f"{prefixes.get(component, '')}_{path.replace('.', '_')}"
    return names


def _losses(
    parts: Sequence[Factors], names: Mapping[str, str], alphas: Mapping[str, float]
) -> list[str]:
    found = []
    unsaid = [target for target, name in names.items() if name.startswith("_")]
    if unsaid:
        components = sorted(set(kohya_names.COMPONENTS.values()) - {""})
        found.append(
            f"{factors.some(unsaid)} lies in no component it has a prefix for "
            f"({', '.join(components)})"
        )
    inexact = [part.target for part in parts if part.target not in alphas]
    if inexact:
        found.append(
            f"no float32 alpha over the rank is the scaling of {factors.some(inexact)}"
        )
    twice = [name for name, count in Counter(names.values()).items() if count > 1]
    if twice:
        found.append(f"two targets would both be called {factors.some(sorted(twice))}")
    grouped = [
        part.target
        for part in parts
        if part.layer == "conv" and part.b.shape[1] != part.rank
    ]
    if grouped:
        found.append(f"{factors.some(grouped)} is a convolution in groups")
    return found


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
    if not is_alpha(alpha):
        problem = f"{name} is {alpha}, expected a finite number below 1e150"
        raise FormatError(problem, where=where)
    return alpha


def _check_alphas(
    alphas: Mapping[str, float], modules: Mapping[str, object], where: str
) -> None:
    """Raise unless all modules have an alpha, or none: files from before it was stored."""
    alone = sorted(alphas.keys() - modules.keys())
    if alone:
        raise FormatError(f"{alone[0]} has an alpha and no factors", where=where)
    without = sorted(modules.keys() - alphas.keys())
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
