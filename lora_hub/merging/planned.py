"""What a merge plan says: a part, a tensor, a file, and the whole, as text for people.

`plan.py` decides; `execute.py` carries out. No torch.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from lora_hub.formats.source import AdapterSource
from lora_hub.tensors.dtypes import BITS

Action = Literal["copy", "cast", "add", "replace", "new"]


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
    """What the plan and the provenance say of a part.

    Attributes:
        targets: how many layers it updates or scales.
        replaced: how many tensors it brings new numbers for.
    """

    name: str | None
    version: str | None
    digest: str | None
    weight: float
    targets: int
    replaced: int = 0


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One tensor of the result.

    Attributes:
        action: copy its bytes; cast its numbers; add the parts' changes to it; replace
            its numbers, or some rows, by a part's; or a new one. All but copy cast too.
        dtype: in the base; of a new tensor, in the adapter.
        written: the dtype in the result.
        parts: indices of the parts that have a say.
        does: what they do, in words.
    """

    name: str
    shape: tuple[int, ...]
    action: Action
    dtype: str
    written: str
    parts: tuple[int, ...] = ()
    does: tuple[str, ...] = ()

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * BITS[self.written] // 8


@dataclass(frozen=True, slots=True)
class PlannedShard:
    """One file of the result, which has the name of a file of the base.

    It has its tensors in their order; what is new comes into the last file.
    """

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
        untied: the head that gets a tensor of its own, which config.json then says; None
            where nothing is untied.
        notes: what a person should know before using the result.
    """

    base: str
    base_root: str | None
    dtype: str | None
    parts: tuple[PlannedPart, ...]
    shards: tuple[PlannedShard, ...]
    size_bytes: int
    copied: tuple[str, ...]
    left_out: tuple[str, ...]
    untied: str | None = None
    notes: tuple[str, ...] = ()

    def tensors(self, action: Action) -> Iterator[tuple[str, PlannedTensor]]:
        """Give the tensors that this happens to, each with its file."""
        for shard in self.shards:
            for tensor in shard.tensors:
                if tensor.action == action:
                    yield shard.file, tensor

    def __str__(self) -> str:
        lines = [f"base {self.base}"]
        lines += [
            f"  + {part.weight:g} × {_called(part)}, {_has(part)}" for part in self.parts
        ]
        for shard in self.shards:
            counts = _counts(shard)
            lines.append(f"{shard.file}: {counts}, {shard.size_bytes / 1e6:.1f} MB")
            lines += [
                f"  {_SIGNS[tensor.action]}{tensor.name} "
                f"{'×'.join(map(str, tensor.shape))} {tensor.dtype} → {tensor.written}, "
                f"{len(tensor.parts)} of {len(self.parts)} adapters"
                + (f" ({', '.join(tensor.does)})" if tensor.does else "")
                for tensor in shard.tensors
                if tensor.action in _SIGNS
            ]
        lines.append(f"copied: {', '.join(self.copied) or 'no other file'}")
        if self.left_out:
            lines.append(f"left out: {', '.join(self.left_out)}")
        return "\n".join((*lines, *self.notes))


# What stands in a plan line by line, and how it is told from the rest.
_SIGNS: Mapping[Action, str] = {"add": "", "replace": "", "new": "new: "}


def _called(part: PlannedPart) -> str:
    name = part.name or "an adapter without a name"
    return f"{name} {part.version}" if part.version else name


def _has(part: PlannedPart) -> str:
    replaced = f", {part.replaced} new tensors" if part.replaced else ""
    return f"{part.targets} targets{replaced}"


def _counts(shard: PlannedShard) -> str:
    said = {
        "add": "changed",
        "replace": "replaced",
        "new": "new",
        "cast": "cast",
        "copy": "copied byte for byte",
    }
    actions = [tensor.action for tensor in shard.tensors]
    return ", ".join(
        f"{actions.count(action)} {text}"
        for action, text in said.items()
        if action in actions
    )
