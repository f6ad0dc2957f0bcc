"""microsoft/LoRA's loralib: factors beside the modules' own names, both ways.

`<module>.lora_A` is (rank, in), `<module>.lora_B` (out, rank). loralib itself saves
pickles, which are never read; here the same names lie in a safetensors file. The scaling
lora_alpha/rank is an argument of its layers and in no file, so the caller must say it.

Limit: loralib's convolutions and embeddings keep factors of two axes under the same
names; they are told from linear layers by what the module is called.

Source: microsoft/LoRA 2eb74c2, `loralib/layers.py`.
"""

import math
import re
from pathlib import Path

from lora_hub.errors import FormatError
from lora_hub.formats import factors
from lora_hub.formats.dialect import Given, Glance, ReadOptions, Written
from lora_hub.formats.factors import Factors
from lora_hub.formats.source import AdapterSource
from lora_hub.tensors.file import TensorFile

WEIGHTS_NAME = "lora.safetensors"
SAYS = frozenset({"alpha64", "components", "float64", "language", "ranks"})

_FACTOR = re.compile(r"(.+)\.lora_([AB])")
_CONVOLUTION = re.compile(r"conv(2d|3d|_.*|\d*)")  # conv, conv1, conv_in; not conv1d_proj


def claim_weights(glance: Glance) -> str | None:
    if glance.header is None or not glance.header.tensors:
        return None
    is_ours = all(
        # AdapterHub's are `<module>.loras.<adapter>.lora_A`: its adapter is no module.
        _FACTOR.fullmatch(name) and ".loras." not in name
        for name in glance.header.tensors
    )
    return "every tensor is named ….lora_A or ….lora_B" if is_ours else None


def read(given: Given, options: ReadOptions) -> AdapterSource:
    """Return the adapter under the alpha that the caller says.

    Raises:
        FormatError: no alpha was said, or a tensor is of a kind that is not read yet.
    """
    where = given.weights_where
    tensors = TensorFile.from_bytes(given.weights, where=where)
    found = []
    for name, tensor in tensors.header.tensors.items():
        match = _FACTOR.fullmatch(name)
        if match is None:
            what = "a bias" if name.endswith(".bias") else "no low-rank factor"
            raise FormatError(
                f"the tensor {name!r} is {what}, which is not read yet", where=where
            )
        if _CONVOLUTION.fullmatch(match[1].rpartition(".")[2]):
            raise FormatError(
                f"{match[1]} is a convolution by its name; only linear layers are read yet",
                where=where,
            )
        found.append((match[1], match[2].lower(), tensor))
    pairs = factors.pair_up(found, where)
    parts = []
    for target, (a, b) in pairs.items():
        whole_a, whole_b = factors.matrix(tensors, a), factors.matrix(tensors, b)
        if len(a.shape) == len(b.shape) == 2 and _groups(a.shape[0], b.shape[1]):
            raise FormatError(
                f"{target}: lora_A has {a.shape[0]} rows and lora_B {b.shape[1]} columns, "
                "as of a MergedLinear (q, k and v in one layer), which is not read yet",
                where=where,
            )
        factors.check_factors(target, whole_a, whole_b, where)
        parts.append(Factors(target, _alpha(options, where), "alpha/r", whole_a, whole_b))
    return factors.to_source(parts, where=where)


def write(source: AdapterSource, base: Path | None = None) -> Written:
    """Return the file, and in the notes the alpha that it cannot hold.

    Raises:
        LossyConversion: there is no one alpha for all targets.
    """
    parts = factors.of_source(source)
    alphas = {part.target: factors.plain_alpha(part) for part in parts}
    losses = []
    inexact = [target for target, alpha in alphas.items() if alpha is None]
    if inexact:
        losses.append(f"no alpha over the rank is the scaling of {factors.some(inexact)}")
    several = sorted({alpha for alpha in alphas.values() if alpha is not None})
    if len(several) > 1:
        losses.append(f"one alpha for all targets, these have {several}")
    factors.refuse(losses, "loralib")
    tensors = {
        f"{part.target}.lora_{which}": whole
        for part in parts
        for which, whole in (("A", part.a), ("B", part.b))
    }
    note = f"the file cannot hold its alpha: read it with lora_alpha={several[0]!r}"
    return Written({WEIGHTS_NAME: factors.safetensors(tensors)}, (note,))


def _groups(rows: int, columns: int) -> bool:
    return columns > 0 and rows > columns and rows % columns == 0


def _alpha(options: ReadOptions, where: str) -> float:
    if options.alpha is None:
        raise FormatError(
            "loralib keeps no scaling in the file",
            where=where,
            hint="say the lora_alpha of the layers with `lorahub convert … --alpha`",
        )
    if not math.isfinite(options.alpha):
        raise FormatError(f"alpha is {options.alpha}, expected a finite number")
    return options.alpha
