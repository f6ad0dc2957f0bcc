"""diffusers' `pytorch_lora_weights.safetensors`: its layouts read, PEFT's names written.

The first part is the component of the pipeline; it stays the first part of the target.
FLUX.1's layers in BFL's names, with or without `diffusion_model.`, become those of
diffusers (`flux.py`). Alphas lie in the header as PEFT's config, or as tensors
`<module>.alpha`, or nowhere: then diffusers takes the rank (`diffusers_scalings.py`). The
names are the matter of `diffusers_names.py`.

Source: huggingface/diffusers 005627e, `loaders/lora_base.py`.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_hub.errors import FormatError, LossyConversion
from lora_hub.formats import (
    base_names,
    diffusers_names,
    factors,
    flux,
    layers,
    losses,
    peft_write,
)
from lora_hub.formats import diffusers_scalings as scalings
from lora_hub.formats.dialect import Given, Glance, ReadOptions, Written
from lora_hub.formats.diffusers_scalings import METADATA_KEY
from lora_hub.formats.factors import Factors
from lora_hub.formats.matrices import Matrix
from lora_hub.formats.source import AdapterSource
from lora_hub.manifest.document import Layer
from lora_hub.tensors.file import TensorFile
from lora_hub.tensors.header import TensorInfo
from lora_hub.tensors.write import TORCH_METADATA

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
SAYS = frozenset(
    {
        "alpha64",
        "components",
        "convolutions",
        "dora",
        "float64",
        "lora_bias",
        "ranks",
        "rslora",
        "scalings",
    }
)


def claim_weights(glance: Glance) -> str | None:
    if glance.header is None or not glance.header.tensors:
        return None
    if METADATA_KEY in glance.header.metadata:
        return f"its header holds {METADATA_KEY}"
    return diffusers_names.evidence(glance.header.tensors.keys())


def read(given: Given, options: ReadOptions) -> AdapterSource:
    """Return the adapter; a file without components is one of a U-Net.

    Raises:
        FormatError: nothing says the scalings of modules of unlike ranks, header and
            tensors disagree, or a tensor is of a kind that is not read.
    """
    where = given.weights_where
    tensors = TensorFile.from_bytes(given.weights, where=where)
    diffusers_names.check_components(tensors.header.tensors, where)
    found = []
    others: dict[str, dict[str, TensorInfo]] = {}
    for name, tensor in tensors.header.tensors.items():
        target, which = diffusers_names.parse(name, where)
        if which in ("a", "b"):
            found.append((target, which, tensor))
            continue
        held = others.setdefault(target, {})
        if which in held:
            raise FormatError(f"two tensors are the {which} of {target}", where=where)
        held[which] = tensor
    pairs = factors.pair_up(found, where)
    alone = sorted(others.keys() - pairs.keys())
    if alone:
        which = next(iter(others[alone[0]]))
        raise FormatError(f"{alone[0]} has its {which} and no factors", where=where)
    parts = {
        target: _part(tensors, target, pair, others.get(target, {}), where)
        for target, pair in pairs.items()
    }
    configs = scalings.configs_of(tensors.header.metadata, where)
    alphas = {
        target: scalings.number(tensors, held["alpha"], where)
        for target, held in others.items()
        if "alpha" in held
    }
    scaled = scalings.applied(parts, configs, alphas, where)
    base_name = scalings.base_name(configs)
    return factors.to_source(_renamed(scaled, where), where=where, base_name=base_name)


def write(source: AdapterSource, base: Path | None = None) -> Written:
    """Return the file that `load_lora_weights` takes, PEFT's config in its header.

    Raises:
        LossyConversion: a target is in no component of a pipeline, PEFT's config cannot say
            what stands in one, or the adapter holds what is no low-rank update of a
            linear layer or a convolution.
    """
    parts = {part.target: part for part in factors.of_source(source)}
    found = losses.beyond(source, SAYS)
    metadata: dict[str, Any] = {}
    for component, targets in base_names.by_component(parts).items():
        if not component:
            found.append(
                f"{factors.some(targets)} lies in no component of a pipeline "
                f"({', '.join(base_names.COMPONENTS)})"
            )
            continue
        try:
            config = peft_write.config_for(_component(source, component))
        except LossyConversion as error:
            found += [f"{loss} ({component})" for loss in error.losses]
        else:
            metadata |= {f"{component}.{key}": value for key, value in config.items()}
    factors.refuse(found, "diffusers")
    tensors: dict[str, Matrix] = {}
    for target, part in parts.items():
        tensors |= {f"{target}.lora_A.weight": part.a, f"{target}.lora_B.weight": part.b}
        if part.bias:
            tensors[f"{target}.lora_B.bias"] = part.bias
        if part.magnitude:
            magnitude = factors.as_stored(part).matrices["m"]
            tensors[f"{target}.lora_magnitude_vector"] = magnitude
    header = {
        **TORCH_METADATA,
        METADATA_KEY: json.dumps(metadata, indent=2, sort_keys=True),
    }
    return Written({WEIGHTS_NAME: factors.safetensors(tensors, header)})


def _component(source: AdapterSource, component: str) -> AdapterSource:
    """Return the part of an adapter in one component, under the paths within it."""
    updates = [
        replace(update, target=path)
        for update in source.updates
        for found, path in (base_names.of_component(update.target),)
        if found == component
    ]
    return AdapterSource(tuple(updates), source.tensors)


# ── layers ───────────────────────────────────────────────────────────────────────────


def _renamed(parts: Iterable[Factors], where: str) -> list[Factors]:
    """Return the parts with FLUX.1's layers as diffusers has them."""
    found: dict[str, Factors] = {}
    for part in parts:
        _, path = base_names.of_component(part.target)
        own = [part]
        if flux.is_block(path):
            own = flux.in_diffusers(replace(part, target=path), where)
        for one in own:
            if one.target in found:
                raise FormatError(f"two tensors are factors of {one.target}", where=where)
            found[one.target] = one
    return list(found.values())


def _part(
    tensors: TensorFile,
    target: str,
    pair: tuple[TensorInfo, TensorInfo],
    others: Mapping[str, TensorInfo],
    where: str,
) -> Factors:
    """Return a target's factors, their scaling still to be found."""
    a, b = (factors.matrix(tensors, tensor) for tensor in pair)
    bias = others.get("bias")
    part = Factors(
        target,
        float(a.shape[0]) if a.shape else 1.0,
        "alpha/r",
        a,
        b,
        layer=_layer(target, a, where),
        bias=factors.matrix(tensors, bias) if bias else None,
    )
    layers.check_factors(part, where)
    if "magnitude" in others:
        magnitude = factors.matrix(tensors, others["magnitude"])
        _check_magnitude(magnitude, part, where)
        part = replace(part, magnitude=magnitude.shaped((b.shape[0],)))
    return part


def _layer(target: str, a: Matrix, where: str) -> Layer:
    layer = layers.layer_of(target, a)
    if layer == "embedding":
        raise FormatError(
            f"{target} is an embedding, of which diffusers loads no update", where=where
        )
    return layer


def _check_magnitude(magnitude: Matrix, part: Factors, where: str) -> None:
    """Raise `FormatError` unless it is DoRA's, one number for each output.

    PEFT keeps (out) or, of a convolution, (1, out, 1, 1), kohya's tools (out, 1, …). Theirs
    of (1, in) is of the inputs.
    """
    outputs, shape = part.b.shape[0], magnitude.shape
    axis = 1 if part.layer == "conv" and shape[:1] == (1,) else 0
    is_of_outputs = shape[axis : axis + 1] == (outputs,) and math.prod(shape) == outputs
    if not is_of_outputs:
        raise FormatError(
            f"{part.target}: its magnitude is {list(shape)} and there are {outputs} "
            "outputs: one of the inputs is another method than DoRA, and not read",
            where=where,
        )
    layers.check_factors(replace(part, magnitude=magnitude), where)
