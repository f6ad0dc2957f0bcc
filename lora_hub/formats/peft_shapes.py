"""One update of PEFT's LoRA from its tensors: the kind of layer, and what must agree.

Source: PEFT 0.21.2, `tuners/lora/layer.py` (Linear, Embedding, _ConvNd, ParamWrapper) and
`tuners/lora/dora.py`.
"""

from lora_hub.errors import FormatError
from lora_hub.formats.peft_tensors import Parts
from lora_hub.formats.source import UpdateSource
from lora_hub.manifest.document import Layer
from lora_hub.scaling import ScalingRule
from lora_hub.tensors.arrays import FLOATS
from lora_hub.tensors.header import TensorInfo

_CONV_AXES = range(3, 6)

_EXPECTED: dict[Layer, str] = {
    "linear": "[rank, in] and [out, rank] of one rank",
    "embedding": "[rank, number of embeddings] and [dimension, rank] of one rank",
    "experts": "[experts * rank, in] and [out, rank * experts]",
    "conv": "[rank, in, kernel…] and [out, rank / groups, 1…]",
}


def make_update(
    target: str,
    parts: Parts,
    *,
    is_parameter: bool,
    rank: int,
    alpha: float,
    rule: ScalingRule,
    where: str,
) -> UpdateSource:
    """Return the update, its shapes and dtypes checked.

    Args:
        target: path of the module, or of the parameter.
        parts: its tensors; both factors are there.
        is_parameter: whether the target is a parameter of a module.
        rank: as the config says; the tensors must agree.
        alpha: as the config says.
        rule: of the whole adapter.
        where: the file, for messages.

    Raises:
        FormatError: they do not.
    """
    a, b = parts.tensors["a"], parts.tensors["b"]
    layer = _layer(parts, is_parameter)
    if not _IS_RIGHT[layer](a.shape, b.shape) or 0 in a.shape or 0 in b.shape:
        raise FormatError(
            f"{target}: lora_A is {list(a.shape)} and lora_B {list(b.shape)}; expected "
            f"{_EXPECTED[layer]}",
            where=where,
        )
    found = a.shape[0]
    if (found % rank if layer == "experts" else found - rank) != 0:
        raise FormatError(
            f"{target}: the factors have rank {found}, adapter_config.json says {rank}",
            where=where,
            hint="the scaling alpha/rank would be a guess; mend r or rank_pattern",
        )
    if a.dtype != b.dtype or a.dtype not in FLOATS:
        raise FormatError(
            f"{target}: the factors are {a.dtype} and {b.dtype}; expected one of "
            f"{', '.join(sorted(FLOATS))} for both",
            where=where,
        )
    magnitude, bias = parts.tensors.get("magnitude"), parts.tensors.get("bias")
    out = b.shape[0]
    for tensor, what in ((magnitude, "magnitude"), (bias, "bias")):
        if tensor is not None:
            _check_vector(tensor, out, what, target, where)
    return UpdateSource(target, rank, alpha, rule, a, b, layer, magnitude, bias)


def magnitude_shape(update: UpdateSource) -> tuple[int, ...]:
    """Return the shape in which PEFT keeps an update's magnitude."""
    out = update.b.shape[0]
    return (1, out, *(1 for _ in update.a.shape[2:])) if update.layer == "conv" else (out,)


def _layer(parts: Parts, is_parameter: bool) -> Layer:
    if parts.is_embedding:
        return "embedding"
    if is_parameter:
        return "experts"
    return "conv" if len(parts.tensors["a"].shape) in _CONV_AXES else "linear"


def _is_pair(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return len(a) == len(b) == 2 and a[0] == b[1]


def _is_conv(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    if len(a) != len(b) or set(b[2:]) != {1} or not b[1] or a[0] % b[1]:
        return False
    groups = a[0] // b[1]
    return groups > 0 and a[1] % groups == 0 and b[0] % groups == 0


_IS_RIGHT = {
    "linear": _is_pair,
    "embedding": _is_pair,
    "experts": _is_pair,
    "conv": _is_conv,
}


def _check_vector(tensor: TensorInfo, out: int, what: str, target: str, where: str) -> None:
    # PEFT keeps a convolution's as (1, out, 1, …).
    if tensor.elements != out or max(tensor.shape, default=1) != out:
        raise FormatError(
            f"{target}: the {what} is {list(tensor.shape)}, expected [{out}]", where=where
        )
    if tensor.dtype not in FLOATS:
        raise FormatError(
            f"{target}: the {what} is {tensor.dtype}, expected one of "
            f"{', '.join(sorted(FLOATS))}",
            where=where,
        )
