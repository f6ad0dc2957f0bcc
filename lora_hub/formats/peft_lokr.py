"""LoKr of PEFT: the Kronecker product of two small matrices, as one pair of factors.

    Δ = scaling * (w1 ⊗ w2)

Each of the two is whole or a product `w_a @ w_b`. The second may be a convolution's
kernel, whole: then Δ is one too, since ⊗ leaves the kernel's axes alone.

Sources: Yeh et al. 2024, arXiv:2309.14859; PEFT 0.21.2, `tuners/lokr/layer.py`.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_hub.formats.computed import Computed, source_of
from lora_hub.formats.peft_loha import TRAINING, rank_and_alpha
from lora_hub.formats.peft_methods import Held, Method, open_method
from lora_hub.formats.products import check_size, kronecker_factors
from lora_hub.formats.source import AdapterSource
from lora_hub.tensors.file import TensorFile

if TYPE_CHECKING:
    from lora_hub.formats.products import Array, Pair

_HALVES = ("lokr_w1", "lokr_w2")
_NAMES = (*(f"{half}{end}" for half in _HALVES for end in ("", "_a", "_b")), "lokr_t2")


def read_lokr(
    config: Mapping[str, Any], tensors: TensorFile, where: str, base: Path | None = None
) -> AdapterSource:
    """Return the adapter in PEFT's files; see `peft_types.Reader`.

    Raises:
        FormatError: config and tensors disagree, or a kernel is decomposed by Tucker or
            has one axis.
    """
    method = open_method(
        config,
        tensors,
        where,
        names=_NAMES,
        read={"alpha", "alpha_pattern", "r", "rank_pattern"},
        inert={
            *TRAINING,
            "decompose_both",
            "decompose_factor",
            "rank_dropout_scale",
            "use_effective_conv2d",
        },
    )
    ranks, alphas = rank_and_alpha(method)
    check_size([_shape(method, held, ranks[held.key]) for held in method.held], where)
    # Here alpha/r scales whole matrices too.
    return source_of(
        method,
        [
            _computed(method, held, alphas[held.key] / ranks[held.key])
            for held in method.held
        ],
    )


def _shape(method: Method, held: Held, rank: int) -> tuple[int, int, int]:
    """Return out, in (with the kernel) and the product's rank, after a look at all."""
    if "lokr_t2" in held.tensors:
        method.refuse(
            held,
            "the kernel is decomposed by Tucker (lokr_t2), whose product is no pair of "
            "factors",
            hint="train it with use_effective_conv2d false, or merge it with PEFT",
        )
    (m1, n1, rank1), (m2, n2, rank2) = (_half(method, held, half, rank) for half in _HALVES)
    return m1 * m2, n1 * n2, rank1 * rank2


def _half(method: Method, held: Held, half: str, rank: int) -> tuple[int, int, int]:
    names = [name for name in (half, f"{half}_a", f"{half}_b") if name in held.tensors]
    shapes = [held.tensors[name].shape for name in names]
    told = ", ".join(f"{name} {list(held.tensors[name].shape)}" for name in names)
    if names not in ([half], [f"{half}_a", f"{half}_b"]):
        method.refuse(
            held, f"{half} is told by {told or 'nothing'}; expected all or its two"
        )
    if any(0 in shape for shape in shapes):
        method.refuse(held, f"a tensor is empty: {told}")
    if len(names) == 2:
        if [len(shape) for shape in shapes] != [2, 2] or not (
            shapes[0][1] == shapes[1][0] == rank
        ):
            method.refuse(held, f"{told}; expected two matrices of rank {rank}")
        return shapes[0][0], shapes[1][1], rank
    (shape,) = shapes
    if len(shape) == 3 and half == "lokr_w2":
        # PEFT multiplies a matrix with three axes here and reshapes the result, which
        # mixes channels: no Kronecker product of the two.
        method.refuse(
            held,
            f"{told} is a kernel of one axis, of which PEFT makes no Kronecker product",
            hint="merge it with PEFT, if that is what was trained",
        )
    if len(shape) != 2 and not (len(shape) == 4 and half == "lokr_w2"):
        method.refuse(held, f"{told}; expected a matrix")
    rows, columns = shape[0], math.prod(shape[1:])
    return rows, columns, min(rows, columns)


def _computed(method: Method, held: Held, scaling: float) -> Computed:
    halves = [_of_half(method, held, half) for half in _HALVES]
    a, b = kronecker_factors(halves[0], halves[1])
    whole = held.tensors.get("lokr_w2")
    if whole is None or len(whole.shape) == 2:
        return Computed(held.target, a, b, scaling)
    kernel = whole.shape[2:]
    return Computed(
        held.target,
        a.reshape(a.shape[0], -1, *kernel),
        b.reshape(*b.shape, *(1 for _ in kernel)),
        scaling,
        layer="conv",
    )


def _of_half(method: Method, held: Held, half: str) -> "Pair | Array":
    if half in held.tensors:
        whole = method.array(held.tensors[half])
        return whole.reshape(whole.shape[0], -1)
    return (
        method.array(held.tensors[f"{half}_a"]),
        method.array(held.tensors[f"{half}_b"]),
    )
