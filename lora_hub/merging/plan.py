"""What a merge will do to every tensor and file, decided before anything is written.

A plan is a plain value (`planned.py`): it can be printed, reviewed and compared without
loading torch. `changes.py` finds what the adapters do to which tensor; `execute.py`
carries it out.
"""

import math
from collections.abc import Mapping, Sequence

from lora_hub.base.folder import FolderBase
from lora_hub.errors import ComposeError, FitError, InputError
from lora_hub.merging.changes import Fate, fates
from lora_hub.merging.files import other_files
from lora_hub.merging.planned import (
    Action,
    MergePlan,
    Part,
    PlannedPart,
    PlannedShard,
    PlannedTensor,
)
from lora_hub.merging.ties import tie_of
from lora_hub.tensors.arrays import FLOATS
from lora_hub.tensors.checkpoint import Checkpoint
from lora_hub.tensors.dtypes import BITS, is_float
from lora_hub.tensors.header import TensorInfo

__all__ = ["DTYPES", "Action", "MergePlan", "Part", "PlannedShard", "PlannedTensor", "plan"]

# What users call a dtype, as torch does → what safetensors calls it.
DTYPES: Mapping[str, str] = {
    "bfloat16": "BF16",
    "float16": "F16",
    "float32": "F32",
    "float64": "F64",
}


def plan(
    base: Checkpoint,
    parts: Sequence[Part],
    *,
    dtype: str | None = None,
    untie: bool = False,
    base_root: str | None = None,
) -> MergePlan:
    """Return what merging the parts into the base will do.

    Whether the base is the one the adapters were made for is the caller's to check
    (`base/fit.py`); here names and shapes must agree.

    Args:
        base: an open checkpoint.
        parts: adapters with finite weights, at least one; weights may be negative.
        dtype: bfloat16, float16, float32 or float64, for all floating-point tensors.
        untie: give a head that shares its tensor with the embedding one of its own.
        base_root: the fingerprint of the base for the provenance, where it is known.

    Raises:
        ComposeError: no parts; a weight that is not finite, or that is not 1 for a tensor
            which the base does not have; or what an adapter does cannot be merged.
        InputError: the dtype is not one of those.
        FitError: a target is not in the base, has another shape, is stored in a dtype that
            sums are not formed in, or shares its tensor with another layer.
    """
    _check_weights(parts)
    written = None if dtype is None else _stored(dtype)
    view = FolderBase(base)
    tie = tie_of(view, untie=untie)
    found = fates([part.source for part in parts], view, tie)
    shards = tuple(
        PlannedShard(
            shard.path.name,
            tuple(
                _tensor(info, found.get(info.name), written, base.where)
                for info in shard.file.header.tensors.values()
            ),
        )
        for shard in base.shards
    )
    new = tuple(
        _new(fate, parts, base, written)
        for fate in found.values()
        if fate.name not in base.tensors
    )
    if new:
        shards = (*shards[:-1], _extended(shards[-1], new))
    copied, left_out = other_files(base)
    brought = [tensor.name for tensor in new if found[tensor.name].base is None]
    untied = tie.head if tie is not None and tie.is_undone else None
    return MergePlan(
        base=base.where,
        base_root=base_root,
        dtype=dtype,
        parts=tuple(map(_planned, parts)),
        shards=shards,
        size_bytes=sum(shard.size_bytes for shard in shards),
        copied=copied,
        left_out=left_out,
        untied=untied,
        notes=_notes(brought, untied, base, shards[-1].file),
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


def _tensor(
    info: TensorInfo, fate: Fate | None, written: str | None, where: str
) -> PlannedTensor:
    """Return the plan for a tensor that the base has."""
    parts = fate.parts if fate else ()
    if parts and info.dtype not in FLOATS:
        raise FitError(
            f"{info.name} is stored as {info.dtype}; sums are formed in "
            f"{', '.join(sorted(FLOATS))}",
            where=where,
            hint="merge into the base as it was before it was quantised",
        )
    if written is not None and is_float(info.dtype) and info.dtype not in FLOATS:
        raise FitError(
            f"{info.name} is stored as {info.dtype}, whose numbers mean something only "
            "together with their scales; it cannot be written in another dtype",
            where=where,
            hint="leave the dtype as it is",
        )
    to = written if written is not None and info.dtype in FLOATS else info.dtype
    action: Action = "copy" if to == info.dtype else "cast"
    if fate is not None and parts:
        action = "replace" if fate.exchanges else "add"
    words = fate.words if fate else ()
    return PlannedTensor(info.name, info.shape, action, info.dtype, to, parts, words)


def _new(
    fate: Fate, parts: Sequence[Part], base: Checkpoint, written: str | None
) -> PlannedTensor:
    """Return the plan for a tensor that the base does not have."""
    if fate.base is not None:  # a head that is untied
        twin = _tensor(base.tensors[fate.base], fate, written, base.where)
        return PlannedTensor(
            fate.name, twin.shape, "new", twin.dtype, twin.written, fate.parts, fate.words
        )
    if len(fate.exchanges) > 1 or parts[fate.parts[0]].weight != 1:
        raise ComposeError(
            "the base does not have this tensor, so that the adapter's can only be taken "
            "as it is: from one adapter, with the weight 1",
            where=fate.name,
        )
    info = fate.exchanges[0].source.tensor
    if info.dtype not in FLOATS:
        raise FitError(
            f"the adapter stores it as {info.dtype}, expected one of "
            f"{', '.join(sorted(FLOATS))}",
            where=fate.name,
        )
    return PlannedTensor(
        fate.name,
        info.shape,
        "new",
        info.dtype,
        written or info.dtype,
        fate.parts,
        fate.words,
    )


def _extended(shard: PlannedShard, new: tuple[PlannedTensor, ...]) -> PlannedShard:
    # Readers in place want no number to lie across its own width, so wide ones come first.
    tensors = sorted((*shard.tensors, *new), key=lambda tensor: -BITS[tensor.written])
    return PlannedShard(shard.file, tuple(tensors))


def _planned(part: Part) -> PlannedPart:
    source = part.source
    targets = {update.target for update in source.updates}
    targets |= {scale.target for scale in source.scales}
    return PlannedPart(
        part.name,
        part.version,
        part.digest,
        part.weight,
        len(targets),
        len(source.replacements),
    )


def _notes(
    brought: Sequence[str], untied: str | None, base: Checkpoint, file: str
) -> tuple[str, ...]:
    notes = []
    if brought:
        told = base.config.get("architectures") or ["nothing"]
        notes.append(
            f"new in {file}: {', '.join(brought)}; config.json still says "
            f"{', '.join(map(str, told))}, so load the result with the class that has "
            "them, such as AutoModelForSequenceClassification"
        )
    if untied:
        notes.append(
            f"untied: {untied} stands beside the embedding, and config.json says "
            "tie_word_embeddings: false"
        )
    return tuple(notes)
