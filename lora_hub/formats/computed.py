"""Factors that a reader computed, as an adapter whose file is in memory.

A scaling stays the very number it is: where no alpha over the rank is that number, the
factors grow by zeros until one is.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_hub.formats.matrices import Matrix
from lora_hub.formats.peft_methods import Method, labels
from lora_hub.formats.products import stored
from lora_hub.formats.source import AdapterSource, Replacement, UpdateSource
from lora_hub.manifest.document import Layer
from lora_hub.scaling import alpha_of
from lora_hub.tensors.file import TensorFile
from lora_hub.tensors.write import TORCH_METADATA, chunks_of

if TYPE_CHECKING:
    from lora_hub.formats.products import Wide


@dataclass(frozen=True, slots=True)
class Computed:
    """One target's factors: `scaling * b @ a`, shapes as in `UpdateSource`."""

    target: str
    a: "Wide"
    b: "Wide"
    scaling: float
    layer: Layer = "linear"


def source_of(method: Method, computed: Sequence[Computed]) -> AdapterSource:
    """Return an adapter of computed factors, its file in memory.

    Factors are stored in float32 where each number is one, in float64 otherwise. Tensors
    of whole modules keep their bytes.
    """
    tensors: dict[str, Matrix] = {}
    scalings: dict[str, float] = {}
    for part in computed:
        a, b, scalings[part.target] = _spelt(part)
        tensors |= {f"{part.target}.a": a, f"{part.target}.b": b}
    for replacement in method.saved:
        info = replacement.tensor
        tensors[f"{replacement.name} whole"] = Matrix(
            info.dtype, info.shape, method.tensors.read(info.name)
        )
    file = in_memory(tensors, method.where)
    updates = [
        UpdateSource(
            target=part.target,
            rank=file.info(f"{part.target}.a").shape[0],
            alpha=scalings[part.target],
            rule="alpha/r",
            a=file.info(f"{part.target}.a"),
            b=file.info(f"{part.target}.b"),
            layer=part.layer,
        )
        for part in computed
    ]
    return AdapterSource(
        updates=tuple(sorted(updates, key=lambda update: update.target)),
        tensors=file,
        replacements=tuple(
            Replacement(
                name=replacement.name,
                role=replacement.role,
                tensor=file.info(f"{replacement.name} whole"),
                rows=replacement.rows,
            )
            for replacement in method.saved
        ),
        **labels(method.config),
    )


def in_memory(tensors: Mapping[str, Matrix], where: str) -> TensorFile:
    """Return a file with these tensors."""
    specs = [(name, tensors[name].dtype, tensors[name].shape) for name in sorted(tensors)]
    data = b"".join(chunks_of(specs, lambda name: (tensors[name].data,), TORCH_METADATA))
    return TensorFile.from_bytes(data, where=where)


def exact_alpha(wanted: float, rank: int) -> tuple[float, int]:
    """Return alpha and rank with alpha/rank = the wanted scaling, exactly.

    The rank is the one given. Where no alpha divided by it is the scaling, it is the next
    power of two, for factors made longer by zeros.
    """
    alpha = alpha_of(wanted, rank, "alpha/r")
    if alpha / rank == wanted:
        return alpha, rank
    return math.ldexp(wanted, rank.bit_length()), 1 << rank.bit_length()


def _spelt(part: Computed) -> tuple[Matrix, Matrix, float]:
    """Return both factors and the alpha with alpha/rank = the scaling, exactly."""
    import numpy as np

    a, b = part.a, part.b
    alpha, rank = exact_alpha(part.scaling, a.shape[0])
    if more := rank - a.shape[0]:
        a = np.concatenate([a, np.zeros((more, *a.shape[1:]))])
        b = np.concatenate([b, np.zeros((b.shape[0], more, *b.shape[2:]))], axis=1)
    return *stored(a, b), alpha
