"""How large an update is and how much of its rank it uses, from r x r matrices.

With G = A·Aᵀ and H = Bᵀ·B, ‖B·A‖² = sum(G ∘ H), and the singular values of B·A are the
roots of the eigenvalues of SᵀHS where G = S·Sᵀ. The dense delta is never formed. In
float64; targets of one shape are taken together, a megabyte at a time.

It is the same for every kind of layer, with a convolution's kernel as one axis and a matrix
for each expert. Of DoRA it is the low-rank part: the weight it is added to is not here.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_hub.formats.source import AdapterSource, UpdateSource
from lora_hub.tensors import arrays
from lora_hub.tensors.header import TensorInfo

if TYPE_CHECKING:
    from numpy.typing import NDArray

# How much of the factors is held as float64 at once: what fits the second-level cache. With
# 16 MiB the adapters of 2 MB in benchmarks/validate.py take four times as long.
BATCH_BYTES = 1 << 20

# Above this rank, which products of factors reach, it takes seconds a target to tell how
# much of it is used.
MAX_RANK = 512

# A singular value below this share of the largest counts as zero. The roots of Gram
# matrices in float64 are right to some 1e-8 of the largest.
NEGLIGIBLE = 1e-6


@dataclass(frozen=True, slots=True)
class Figures:
    """What the numbers of one update say.

    Attributes:
        frobenius: norm of the delta, scaling included, of all experts together; None
            where it is not finite.
        used_rank: numerical rank of b @ a, of experts the largest; 0 where it is zero or
            not finite; None above `MAX_RANK`, where it is not looked at.
        is_b_zero: whether every number of b is zero, as before training.
    """

    frobenius: float | None
    used_rank: int | None
    is_b_zero: bool


def figures_of(source: AdapterSource) -> tuple[Figures, ...]:
    """Return the figures of every update, in their order; reads every factor once."""
    found: dict[str, Figures] = {}
    for batch in _batches(source.updates):
        found |= zip((one.target for one in batch), _figures(source, batch), strict=True)
    return tuple(found[update.target] for update in source.updates)


def _batches(updates: Sequence[UpdateSource]) -> Iterator[list[UpdateSource]]:
    groups: dict[tuple[object, ...], list[UpdateSource]] = {}
    for update in updates:
        a, b = update.a, update.b
        key = (update.layer, update.rank, a.dtype, a.shape, b.dtype, b.shape)
        groups.setdefault(key, []).append(update)
    for group in groups.values():
        one_bytes = 8 * (group[0].a.elements + group[0].b.elements)
        count = max(1, BATCH_BYTES // max(one_bytes, 1))
        for start in range(0, len(group), count):
            yield group[start : start + count]


def _figures(source: AdapterSource, batch: Sequence[UpdateSource]) -> Iterator[Figures]:
    import numpy as np

    a, b = _matrices(source, batch)
    is_zero = (b == 0).all(axis=(1, 2, 3))
    inputs = a.shape[-1]
    with np.errstate(invalid="ignore", over="ignore"):
        if a.shape[-2] > min(a.shape[-1], b.shape[-2]):
            # Then the delta is smaller than r x r, which of a flat factor would be huge.
            a, b = _eye_beside(b @ a)
        g = a @ a.swapaxes(-1, -2)
        h = b.swapaxes(-1, -2) @ b
        squared = (g * h).sum(axis=(1, 2, 3))
    # A NaN or an infinity anywhere in a factor is one on the diagonal of its matrix.
    is_finite = np.isfinite(g).all(axis=(1, 2, 3)) & np.isfinite(h).all(axis=(1, 2, 3))
    is_finite &= np.isfinite(squared)
    kept = is_finite[:, None, None, None]
    ranks: Sequence[int | None] = [None] * len(batch)
    if batch[0].rank <= MAX_RANK:
        each = _ranks(*(np.where(kept, m, 0.0) for m in (g, h)))
        # The groups of a convolution share its rank, of experts each has the whole.
        is_shared = batch[0].layer != "experts"
        used = np.minimum(each.sum(axis=1), inputs) if is_shared else each.max(axis=1)
        ranks = used.tolist()
    for index, update in enumerate(batch):
        # Rounding may leave a tiny negative number where the delta is zero.
        norm = math.sqrt(max(float(squared[index]), 0.0)) if is_finite[index] else None
        yield Figures(
            frobenius=None if norm is None else abs(update.scaling) * norm,
            used_rank=ranks[index],
            is_b_zero=bool(is_zero[index]),
        )


def _matrices(
    source: AdapterSource, batch: Sequence[UpdateSource]
) -> tuple["NDArray[Any]", "NDArray[Any]"]:
    """Return the factors of updates of one layer and one shape, in float64.

    Returns:
        a (updates, experts, rank, inputs) and b (updates, experts, outputs, rank). Groups
        of a convolution stand as experts, each with its share of rank and outputs; of
        other layers there is one.
    """
    first, count = batch[0], len(batch)
    a = _stacked(source, [update.a for update in batch])
    b = _stacked(source, [update.b for update in batch])
    if first.layer == "experts":
        split = b.reshape(count, b.shape[1], first.rank, first.experts)
        return (
            a.reshape(count, first.experts, first.rank, -1),
            split.transpose(0, 3, 1, 2),
        )
    # b of a grouped convolution has the columns of its own group alone.
    b = b.reshape(count, b.shape[1], -1)
    groups = first.rank // b.shape[2]
    return (
        a.reshape(count, groups, first.rank // groups, -1),
        b.reshape(count, groups, b.shape[1] // groups, b.shape[2]),
    )


def _eye_beside(delta: "NDArray[Any]") -> tuple["NDArray[Any]", "NDArray[Any]"]:
    """Return a and b whose product is the delta: it and the identity, the smaller one."""
    import numpy as np

    outputs, inputs = delta.shape[-2:]
    eye = np.broadcast_to(
        np.eye(min(outputs, inputs)), (*delta.shape[:2], *[min(outputs, inputs)] * 2)
    )
    return (delta, eye) if outputs <= inputs else (eye, delta)


def _ranks(g: "NDArray[Any]", h: "NDArray[Any]") -> "NDArray[Any]":
    import numpy as np

    values, vectors = np.linalg.eigh(g)
    root = vectors * np.sqrt(np.maximum(values, 0.0))[..., None, :]
    core = root.swapaxes(-1, -2) @ h @ root
    singular = np.sqrt(np.maximum(np.linalg.eigvalsh(core), 0.0))
    largest = singular.max(axis=-1, keepdims=True)
    counts: NDArray[Any] = ((singular > NEGLIGIBLE * largest) & (largest > 0)).sum(axis=-1)
    return counts


def _stacked(source: AdapterSource, infos: Sequence[TensorInfo]) -> "NDArray[Any]":
    import numpy as np

    out = np.empty((len(infos), *infos[0].shape), dtype="f8")
    with np.errstate(invalid="ignore"):  # a signalling NaN becomes a quiet one
        for index, info in enumerate(infos):
            data = source.tensors.read(info.name)
            out[index] = arrays.floats(data, info.dtype, info.shape)
    return out
