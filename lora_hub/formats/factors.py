"""The two factors of a target as bytes, on their way from one dialect to another.

Dialects give and take `Factors`; `to_source` makes an `AdapterSource` of them and
`of_source` takes one apart. Numbers are moved as raw integers: a transposition of bfloat16
needs no bfloat16, and no bit of a number changes.
"""

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from lora_hub.errors import FormatError, LossyConversion
from lora_hub.formats.source import AdapterSource, UpdateSource
from lora_hub.scaling import ScalingRule, alpha_of, scaling
from lora_hub.tensors.arrays import FLOATS
from lora_hub.tensors.dtypes import BITS
from lora_hub.tensors.file import TensorFile
from lora_hub.tensors.header import TensorInfo
from lora_hub.tensors.write import TORCH_METADATA, chunks_of

# A file's content in pieces.
Chunks = tuple[bytes | memoryview, ...]

# Last parts of the names that models give to their embeddings. Their updates lie in files
# under the names and shapes of a linear layer's and mean something else.
_EMBEDDINGS = frozenset(
    {
        "embed_in",
        "embed_positions",
        "embed_tokens",
        "position_embedding",
        "position_embeddings",
        "shared",
        "tok_embeddings",
        "token_embedding",
        "word_embeddings",
        "wpe",
        "wte",
    }
)

# A list in a message names so many targets and counts the others.
_NAMED = 3


@dataclass(frozen=True, slots=True)
class Matrix:
    """A tensor's bytes, row-major and little endian."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes | memoryview

    def transposed(self) -> "Matrix":
        """Return the matrix with its axes exchanged, its numbers bit for bit."""
        import numpy as np

        whole = np.frombuffer(self.data, dtype=f"<u{BITS[self.dtype] // 8}")
        moved = np.ascontiguousarray(whole.reshape(self.shape).T)
        return replace(self, shape=self.shape[::-1], data=moved.tobytes())


@dataclass(frozen=True, slots=True)
class Factors:
    """One target's update: a (rank, in_features), b (out_features, rank), its scaling."""

    target: str
    alpha: float
    rule: ScalingRule
    a: Matrix
    b: Matrix

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def scaling(self) -> float:
        return scaling(self.alpha, self.rank, self.rule)


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


def check_factors(target: str, a: Matrix, b: Matrix, where: str) -> None:
    """Raise `FormatError` unless a and b are the factors of a linear layer."""
    shapes = f"the factors are {list(a.shape)} and {list(b.shape)}"
    if len(a.shape) != 2 or len(b.shape) != 2:
        kind = {3: "experts", 4: "a convolution", 5: "a convolution"}
        what = kind.get(len(a.shape), "no linear layer")
        raise FormatError(
            f"{target}: {shapes}, as for {what}; only linear layers are read yet",
            where=where,
        )
    if a.shape[0] != b.shape[1] or 0 in a.shape + b.shape:
        raise FormatError(
            f"{target}: {shapes}; expected [rank, in] and [out, rank] of one rank",
            where=where,
        )
    if a.dtype != b.dtype or a.dtype not in FLOATS:
        raise FormatError(
            f"{target}: the factors are {a.dtype} and {b.dtype}; expected one of "
            f"{', '.join(sorted(FLOATS))} for both",
            where=where,
        )
    if target.rpartition(".")[2] in _EMBEDDINGS:
        raise FormatError(
            f"{target} is an embedding, whose update is not read yet", where=where
        )


def to_source(
    parts: Iterable[Factors], *, where: str, base_name: str | None = None
) -> AdapterSource:
    """Return an adapter whose file is in memory, two tensors for each target.

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
        for which, whole in (("a", part.a), ("b", part.b))
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
        )
        for target, part in by_target.items()
    )
    return AdapterSource(updates=updates, tensors=file, base_name=base_name)


def of_source(source: AdapterSource) -> list[Factors]:
    """Return the updates of an adapter with their bytes, in order of targets."""
    return [
        Factors(
            target=update.target,
            alpha=update.alpha,
            rule=update.rule,
            a=matrix(source.tensors, update.a),
            b=matrix(source.tensors, update.b),
        )
        for update in sorted(source.updates, key=lambda update: update.target)
    ]


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
