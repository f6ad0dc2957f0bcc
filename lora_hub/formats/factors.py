"""A target's update as bytes, on its way from one dialect to another.

Dialects give and take `Factors`; `to_source` makes an `AdapterSource` of them and
`of_source` takes one apart. Numbers are moved as raw integers (`matrices.py`), and no bit
of one changes. What a dialect cannot say is the matter of `losses.py`.
"""

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from lora_hub.errors import FormatError, LossyConversion
from lora_hub.formats.matrices import Matrix, stacked, zeros
from lora_hub.formats.source import AdapterSource, UpdateSource
from lora_hub.manifest.document import Layer
from lora_hub.scaling import ScalingRule, alpha_of, scaling
from lora_hub.tensors.file import TensorFile
from lora_hub.tensors.header import TensorInfo
from lora_hub.tensors.write import TORCH_METADATA, chunks_of

# A file's content in pieces.
Chunks = tuple[bytes | memoryview, ...]

# A list in a message names so many targets and counts the others.
_NAMED = 3


@dataclass(frozen=True, slots=True)
class Factors:
    """One target's update: `scaling * b @ a`, and what belongs to it.

    Attributes:
        a: shaped as `UpdateSource` says of its layer, and so is `b`.
        experts: how many share the factors; 1 for other layers.
        magnitude: (out_features,), DoRA's.
        bias: (out_features,), added to the output times the scaling.
    """

    target: str
    alpha: float
    rule: ScalingRule
    a: Matrix
    b: Matrix
    layer: Layer = "linear"
    experts: int = 1
    magnitude: Matrix | None = None
    bias: Matrix | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[0] // self.experts

    @property
    def scaling(self) -> float:
        return scaling(self.alpha, self.rank, self.rule)

    @property
    def matrices(self) -> dict[str, Matrix]:
        """What it consists of, by short names."""
        found = {"a": self.a, "b": self.b, "m": self.magnitude, "bias": self.bias}
        return {name: whole for name, whole in found.items() if whole is not None}


def pair_up(
    found: Iterable[tuple[str, str, TensorInfo]], where: str
) -> dict[str, tuple[TensorInfo, TensorInfo]]:
    """Return target → its factors a and b, in order of targets.

    Args:
        found: target, "a" or "b", and the tensor.
        where: the file, for messages.

    Raises:
        FormatError: a factor is missing or stands twice, or there is none at all.
    """
    halves: dict[str, dict[str, TensorInfo]] = {}
    for target, which, tensor in found:
        half = halves.setdefault(target, {})
        if which in half:
            raise FormatError(f"two tensors are factors of {target}", where=where)
        half[which] = tensor
    if not halves:
        raise FormatError("the file holds no factors", where=where)
    for target, half in halves.items():
        if len(half) == 1:
            (tensor,) = half.values()
            raise FormatError(
                f"{target} has {tensor.name!r} and not the other factor",
                where=where,
                hint="both factors are needed; the file is incomplete",
            )
    return {target: (half["a"], half["b"]) for target, half in sorted(halves.items())}


def matrix(file: TensorFile, tensor: TensorInfo) -> Matrix:
    """Return a tensor of a file."""
    return Matrix(tensor.dtype, tensor.shape, file.read(tensor.name))


def of_scaling(
    target: str, wanted: float, a: Matrix, b: Matrix, layer: Layer = "linear"
) -> Factors:
    """Return factors whose alpha/rank is the wanted scaling, exactly.

    Where no alpha is one, the rank grows to a power of two by rows and columns of zeros.

    Args:
        target: its path.
        wanted: the scaling.
        a: (rank, in, *kernel).
        b: (out, rank, 1, …).
        layer: not of experts.
    """
    rank = a.shape[0]
    alpha = alpha_of(wanted, rank, "alpha/r")
    if alpha / rank != wanted:
        more = (1 << rank.bit_length()) - rank
        a = stacked([a, zeros(a.dtype, (more, *a.shape[1:]))])
        b = stacked([b, zeros(b.dtype, (b.shape[0], more, *b.shape[2:]))], axis=1)
        alpha = math.ldexp(wanted, rank.bit_length())
    return Factors(target, alpha, "alpha/r", a, b, layer=layer)


def to_source(
    parts: Iterable[Factors], *, where: str, base_name: str | None = None
) -> AdapterSource:
    """Return an adapter whose file is in memory.

    An adapter has one scaling rule: where the parts have two, all are said as alpha/rank.

    Raises:
        FormatError: the parts have two rules, and no alpha/rank is one of the scalings.
    """
    by_target = {part.target: part for part in sorted(parts, key=lambda part: part.target)}
    if len({part.rule for part in by_target.values()}) > 1:
        by_target = {target: _plain(part, where) for target, part in by_target.items()}
    tensors = {
        f"{target}.{which}": whole
        for target, part in by_target.items()
        for which, whole in as_stored(part).matrices.items()
    }
    file = TensorFile.from_bytes(b"".join(safetensors(tensors)), where=where)
    updates = tuple(
        UpdateSource(
            target=target,
            rank=part.rank,
            alpha=part.alpha,
            rule=part.rule,
            a=file.info(f"{target}.a"),
            b=file.info(f"{target}.b"),
            layer=part.layer,
            magnitude=file.info(f"{target}.m") if part.magnitude else None,
            bias=file.info(f"{target}.bias") if part.bias else None,
        )
        for target, part in by_target.items()
    )
    return AdapterSource(updates=updates, tensors=file, base_name=base_name)


def as_stored(part: Factors) -> Factors:
    """Return the part with its vectors in PEFT's shapes; (1, out, 1, …) for conv."""
    magnitude = part.magnitude
    if magnitude:
        count = part.b.shape[0]
        ones = (1,) * (len(part.a.shape) - 2)
        shape = (1, count, *ones) if part.layer == "conv" else (count,)
        magnitude = magnitude.shaped(shape)
    bias = part.bias.shaped((part.b.shape[0],)) if part.bias else None
    return replace(part, magnitude=magnitude, bias=bias)


def of_source(source: AdapterSource) -> list[Factors]:
    """Return the updates of an adapter with their bytes, in order of targets.

    Whatever else the adapter changes is left out: `losses.beyond` tells a writer of it.
    """
    return [_of_update(source, update) for update in sorted(source.updates, key=_target)]


def _of_update(source: AdapterSource, update: UpdateSource) -> Factors:
    flat = (update.b.shape[0],)
    return Factors(
        target=update.target,
        alpha=update.alpha,
        rule=update.rule,
        a=matrix(source.tensors, update.a),
        b=matrix(source.tensors, update.b),
        layer=update.layer,
        experts=update.experts,
        magnitude=matrix(source.tensors, update.magnitude).shaped(flat)
        if update.magnitude
        else None,
        bias=matrix(source.tensors, update.bias).shaped(flat) if update.bias else None,
    )


def _target(update: UpdateSource) -> str:
    return update.target


def safetensors(
    tensors: Mapping[str, Matrix], metadata: Mapping[str, str] = TORCH_METADATA
) -> Chunks:
    """Return the bytes of a file with these tensors, in order of their names."""
    names = sorted(tensors)
    specs = [(name, tensors[name].dtype, tensors[name].shape) for name in names]
    return tuple(chunks_of(specs, lambda name: (tensors[name].data,), metadata))


# ── what a dialect can say ───────────────────────────────────────────────────────────


def plain_alpha(part: Factors) -> float | None:
    """Return the alpha with alpha/rank = the part's scaling, None where there is none."""
    if part.rule == "alpha/r":
        return part.alpha
    alpha = alpha_of(part.scaling, part.rank, "alpha/r")
    return alpha if alpha / part.rank == part.scaling else None


def _plain(part: Factors, where: str) -> Factors:
    alpha = plain_alpha(part)
    if alpha is None:
        raise FormatError(
            f"{part.target} is scaled by the rule of rsLoRA and other targets are not, and "
            "no alpha/rank is the same number",
            where=where,
        )
    return replace(part, alpha=alpha, rule="alpha/r")


def float32_alpha(part: Factors) -> float | None:
    """Return the float32 alpha with alpha/rank = the part's scaling, None if there is none.

    Several float64 numbers may have one scaling, so the one of float32 is looked for and
    not `part.alpha` asked.
    """
    try:
        (alpha,) = struct.unpack("<f", struct.pack("<f", part.scaling * part.rank))
    except OverflowError:
        return None
    return float(alpha) if alpha / part.rank == part.scaling else None


def some(targets: Sequence[str]) -> str:
    """Return the first of the targets, and how many more there are."""
    more = len(targets) - _NAMED
    return ", ".join(targets[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def refuse(losses: Sequence[str], dialect: str) -> None:
    """Raise `LossyConversion` if anything would be lost."""
    if losses:
        raise LossyConversion(
            f"{dialect} cannot say this adapter exactly: {'; '.join(losses)}",
            losses=tuple(losses),
            hint="nothing was written; docs/formats.md tells what each dialect can say",
        )
