"""What a merge will do to every tensor and file, decided before anything is written.

A plan is a plain value: it can be printed, reviewed and compared without loading torch.
`execute.py` carries it out.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lora_hub.base.fit import check_structure
from lora_hub.base.folder import FolderBase
from lora_hub.errors import ComposeError, FitError, InputError
from lora_hub.formats.source import AdapterSource
from lora_hub.merging.files import other_files
from lora_hub.tensors.checkpoint import Checkpoint
from lora_hub.tensors.dtypes import BITS, is_float
from lora_hub.tensors.header import TensorInfo

# What users call a dtype, as torch does → what safetensors calls it.
DTYPES: Mapping[str, str] = {
    "bfloat16": "BF16",
    "float16": "F16",
    "float32": "F32",
    "float64": "F64",
}
# Only these are summed or cast: fp8 and narrower come with scales of their own.
_COMPUTES = frozenset(DTYPES.values())

# Last parts of module names. A tied pair is one tensor with two uses: merging an update of
# one use would change the other as well.
_EMBEDDINGS = frozenset({"embed_tokens", "embed_in", "wte", "word_embeddings", "shared"})
_HEADS = frozenset({"lm_head", "embed_out"})
_HEAD_WEIGHTS = tuple(f"{head}.weight" for head in sorted(_HEADS))

Action = Literal["copy", "cast", "add"]


@dataclass(frozen=True, slots=True)
class Part:
    """An adapter to merge, and how much of it."""

    source: AdapterSource
    weight: float = 1.0
    name: str | None = None
    version: str | None = None
    digest: str | None = None


@dataclass(frozen=True, slots=True)
class PlannedPart:
    """What the plan and the provenance say of a part."""

    name: str | None
    version: str | None
    digest: str | None
    weight: float
    targets: int


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One tensor of the result.

    Attributes:
        action: copy its bytes, cast its numbers, or add the parts' deltas (and cast).
        dtype: in the base.
        written: the dtype in the result.
        parts: indices of the parts that add to it.
    """

    name: str
    shape: tuple[int, ...]
    action: Action
    dtype: str
    written: str
    parts: tuple[int, ...] = ()

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * BITS[self.written] // 8


@dataclass(frozen=True, slots=True)
class PlannedShard:
    """One file of the result; it has the name and the tensors of a file of the base."""

    file: str
    tensors: tuple[PlannedTensor, ...]

    @property
    def size_bytes(self) -> int:
        return sum(tensor.size_bytes for tensor in self.tensors)


@dataclass(frozen=True, slots=True)
class MergePlan:
    """All that a merge will write.

    Attributes:
        base: what the base is called in messages.
        base_root: the fingerprint of the base, where it is known.
        dtype: what every floating-point tensor is written as, a name in `DTYPES`; None
            keeps each one's own.
        size_bytes: of all tensors in the result.
        copied: other files taken along.
        left_out: other files of the base that the result will not have.
    """

    base: str
    base_root: str | None
    dtype: str | None
    parts: tuple[PlannedPart, ...]
    shards: tuple[PlannedShard, ...]
    size_bytes: int
    copied: tuple[str, ...]
    left_out: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"base {self.base}"]
        lines += [
            f"  + {part.weight:g} × {_called(part)}, {part.targets} targets"
            for part in self.parts
        ]
        for shard in self.shards:
            counts = _counts(shard)
            lines.append(f"{shard.file}: {counts}, {shard.size_bytes / 1e6:.1f} MB")
            lines += [
                f"  {tensor.name} {'×'.join(map(str, tensor.shape))} "
                f"{tensor.dtype} → {tensor.written}, {len(tensor.parts)} of "
                f"{len(self.parts)} adapters"
                for tensor in shard.tensors
                if tensor.action == "add"
            ]
        lines.append(f"copied: {', '.join(self.copied) or 'no other file'}")
        if self.left_out:
            lines.append(f"left out: {', '.join(self.left_out)}")
        return "\n".join(lines)


def plan(
    base: Checkpoint,
    parts: Sequence[Part],
    *,
    dtype: str | None = None,
    base_root: str | None = None,
) -> MergePlan:
    """Return what merging the parts into the base will do.

    Whether the base is the one the adapters were made for is the caller's to check
    (`base/fit.py`); here names and shapes must agree.

    Args:
        base: an open checkpoint.
        parts: adapters with finite weights, at least one; weights may be negative.
        dtype: bfloat16, float16, float32 or float64, for all floating-point tensors.
        base_root: the fingerprint of the base for the provenance, where it is known.

    Raises:
        ComposeError: no parts, or a weight that is not finite.
        InputError: the dtype is not one of those.
        FitError: a target is not in the base, has another shape, is stored in a dtype that
            sums are not formed in, or shares its tensor with another layer.
    """
    _check_weights(parts)
    written = None if dtype is None else _stored(dtype)
    view = FolderBase(base)
    for part in parts:
        _check_untied(part, base)
        check_structure(part.source.updates, view)
    users: dict[str, list[int]] = {}
    for index, part in enumerate(parts):
        for update in part.source.updates:
            users.setdefault(f"{update.target}.weight", []).append(index)
    shards = tuple(
        PlannedShard(
            shard.path.name,
            tuple(
                _tensor(info, tuple(users.get(info.name, ())), written, base.where)
                for info in shard.file.header.tensors.values()
            ),
        )
        for shard in base.shards
    )
    copied, left_out = other_files(base)
    return MergePlan(
        base=base.where,
        base_root=base_root,
        dtype=dtype,
        parts=tuple(
            PlannedPart(
                part.name, part.version, part.digest, part.weight, len(part.source.updates)
            )
            for part in parts
        ),
        shards=shards,
        size_bytes=sum(shard.size_bytes for shard in shards),
        copied=copied,
        left_out=left_out,
    )


def _check_weights(parts: Sequence[Part]) -> None:
    if not parts:
        raise ComposeError(
            "there is nothing to merge",
            hint="name at least one adapter, as NAME or NAME=0.7",
        )
    for index, part in enumerate(parts):
        if not math.isfinite(part.weight):
            raise ComposeError(
                f"the weight is {part.weight}, expected a finite number",
                where=part.name or f"adapter {index + 1}",
            )


def _stored(dtype: str) -> str:
    try:
        return DTYPES[dtype]
    except KeyError:
        raise InputError(
            f"{dtype!r} is no dtype to merge to", hint=f"one of {', '.join(DTYPES)}"
        ) from None


def _check_untied(part: Part, base: Checkpoint) -> None:
    """Refuse updates of an embedding or a head that share one tensor."""
    tied = base.config.get("tie_word_embeddings")
    if tied is None:  # left out where it is the architecture's own default
        tied = not any(name.endswith(_HEAD_WEIGHTS) for name in base.tensors)
    if tied is False:
        return
    for update in part.source.updates:
        if update.target.rpartition(".")[2] in _EMBEDDINGS | _HEADS:
            raise FitError(
                "the base keeps one tensor for its embedding and its head; merging would "
                "change both, the adapter changes one",
                where=update.target,
                hint="attach the adapter instead, or save the base with the two untied",
            )


def _tensor(
    info: TensorInfo, parts: tuple[int, ...], written: str | None, where: str
) -> PlannedTensor:
    if parts and info.dtype not in _COMPUTES:
        raise FitError(
            f"{info.name} is stored as {info.dtype}; sums are formed in "
            f"{', '.join(sorted(_COMPUTES))}",
            where=where,
            hint="merge into the base as it was before it was quantised",
        )
    if written is not None and is_float(info.dtype) and info.dtype not in _COMPUTES:
        raise FitError(
            f"{info.name} is stored as {info.dtype}, whose numbers mean something only "
            "together with their scales; it cannot be written in another dtype",
            where=where,
            hint="leave the dtype as it is",
        )
    to = written if written is not None and info.dtype in _COMPUTES else info.dtype
    action: Action = "add" if parts else "copy" if to == info.dtype else "cast"
    return PlannedTensor(info.name, info.shape, action, info.dtype, to, parts)


def _called(part: PlannedPart) -> str:
    name = part.name or "an adapter without a name"
    return f"{name} {part.version}" if part.version else name


def _counts(shard: PlannedShard) -> str:
    said = {"add": "changed", "cast": "cast", "copy": "copied byte for byte"}
    actions = [tensor.action for tensor in shard.tensors]
    return ", ".join(
        f"{actions.count(action)} {text}"
        for action, text in said.items()
        if action in actions
    )
