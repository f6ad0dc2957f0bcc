"""Carry out a merge plan: base + adapters → a checkpoint folder, some rows at a time.

For each changed weight the deltas of all adapters are summed in float64, rounded once to
float32, added to the weight in float32 and cast once to the dtype that is written (all in
float64 where that or the base is float64). What is replaced and not changed further is cast
once. Tensors that nothing touches keep their bytes, files keep their names, and the folder
appears when it is whole.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lora_hub import atomic
from lora_hub.adapter.merged_rows import summed, wide_of
from lora_hub.adapter.tensor_bytes import TORCH, to_bytes
from lora_hub.base.folder import FolderBase
from lora_hub.errors import ComposeError
from lora_hub.merging import files, provenance
from lora_hub.merging.changes import Fate, fates
from lora_hub.merging.numbers import Block, blocks, loader, plain_blocks
from lora_hub.merging.planned import Action, MergePlan, Part, PlannedShard, PlannedTensor
from lora_hub.merging.ties import tie_of
from lora_hub.tensors.checkpoint import Checkpoint, Shard
from lora_hub.tensors.write import write_tensors

Progress = Callable[[int, int], None]  # bytes written, bytes in all


@dataclass(frozen=True, slots=True)
class MergedTensor:
    """A tensor that was changed, or is new.

    `rounding_error` is what the dtype lost of the change: ‖written − W − Δ‖ / ‖Δ‖ in
    Frobenius norms; 0 is exact, and at 1 as much was lost as was added. Of what is new, W
    is zero.
    """

    name: str
    dtype: str
    rounding_error: float
    action: Action = "add"


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What a merge wrote; `str` of it is for people."""

    out: str
    files: tuple[str, ...]
    size_bytes: int
    tensors: int
    changed: tuple[MergedTensor, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        new = sum(tensor.action == "new" for tensor in self.changed)
        lines = [
            f"wrote {self.out}: {self.tensors} tensors, {self.size_bytes / 1e6:.1f} MB, "
            f"{len(self.changed) - new} of them changed" + (f", {new} new" if new else "")
        ]
        if self.changed:
            worst = max(self.changed, key=lambda tensor: tensor.rounding_error)
            lines.append(
                f"rounding to {worst.dtype} lost at most {worst.rounding_error:.2g} of a "
                f"change ({worst.name})"
            )
        return "\n".join((*lines, *self.notes))


def execute(
    plan: MergePlan,
    base: Checkpoint,
    parts: Sequence[Part],
    out: Path,
    *,
    progress: Progress | None = None,
) -> MergeReport:
    """Write what the plan says and return how well the changes survived rounding.

    Args:
        plan: made from this base and these parts.
        base: open.
        parts: in the order of the plan.
        out: a folder that does not exist yet, or is empty. A merge that is killed leaves
            nothing of this name.
        progress: called now and then.

    Raises:
        ComposeError: a merged number is not finite in the dtype that is written.
        StoreError: `out` is taken, or the disk refuses.
        InputError: the base cannot be read.
    """
    run = _Run(plan, base, parts, progress)
    edits = files.Edits(
        size_bytes=plan.size_bytes,
        dtype=plan.dtype,
        new={tensor.name: file for file, tensor in plan.tensors("new")},
        parameters=sum(math.prod(tensor.shape) for _, tensor in plan.tensors("new")),
        is_untied=plan.untied is not None,
    )
    with atomic.new_folder(out) as folder:
        for shard, held in zip(plan.shards, base.shards, strict=True):
            run.write(shard, held, folder)
        for name in plan.copied:
            atomic.replace(folder / name, files.chunks(base.folder / name, edits))
        atomic.replace(folder / files.PROVENANCE_NAME, [provenance.encode(plan)])
    return MergeReport(
        out=str(out),
        files=(*(shard.file for shard in plan.shards), *plan.copied, files.PROVENANCE_NAME),
        size_bytes=plan.size_bytes,
        tensors=sum(len(shard.tensors) for shard in plan.shards),
        changed=tuple(run.changed),
        notes=plan.notes,
    )


class _Run:
    """The bytes of each tensor, and what was learnt on the way."""

    def __init__(
        self,
        plan: MergePlan,
        base: Checkpoint,
        parts: Sequence[Part],
        progress: Progress | None,
    ) -> None:
        self.changed: list[MergedTensor] = []
        self._base = base
        self._parts = parts
        self._load = loader(parts)
        view = FolderBase(base)
        tie = tie_of(view, untie=plan.untied is not None)
        self._fates = fates([part.source for part in parts], view, tie)
        self._progress = progress or (lambda _done, _total: None)
        self._done = 0
        self._total = plan.size_bytes

    def write(self, shard: PlannedShard, held: Shard, folder: Path) -> None:
        tensors = {tensor.name: tensor for tensor in shard.tensors}
        write_tensors(
            folder / shard.file,
            [(tensor.name, tensor.written, tensor.shape) for tensor in shard.tensors],
            lambda name: self._counted(tensors[name]),
            held.file.header.metadata,
        )

    def _counted(self, tensor: PlannedTensor) -> Iterator[memoryview]:
        for chunk in self._made(tensor):
            yield chunk
            self._done += chunk.nbytes
            self._progress(self._done, self._total)

    def _made(self, tensor: PlannedTensor) -> Iterator[memoryview]:
        fate = self._fates.get(tensor.name) or Fate(tensor.name, tensor.name)
        if fate.exchanges or fate.changes:
            return self._changed(tensor, fate)
        assert fate.base is not None  # what nobody brings is the base's
        if tensor.written != tensor.dtype:
            return self._cast(tensor, fate.base)
        return self._base.shard_of(fate.base).file.chunks(fate.base)

    def _cast(self, tensor: PlannedTensor, name: str) -> Iterator[memoryview]:
        for block in plain_blocks(name, tensor.shape, tensor.dtype, self._base):
            cast = block.to(TORCH[tensor.written])
            _check_finite(cast, block, tensor)
            yield to_bytes(cast)

    def _changed(self, tensor: PlannedTensor, fate: Fate) -> Iterator[memoryview]:
        written = TORCH[tensor.written]
        wide = wide_of(TORCH[tensor.dtype], written)
        lost = added = 0.0
        for block in blocks(
            fate, tensor.shape, tensor.dtype, self._base, self._parts, self._load
        ):
            merged = summed(block.start, block.change, wide).to(written)
            _check_finite(merged, block.base, tensor)
            moved, missed = _measured(block, merged)
            added, lost = added + moved, lost + missed
            yield to_bytes(merged)
        error = math.sqrt(lost / added) if added else 0.0
        self.changed.append(MergedTensor(tensor.name, tensor.written, error, tensor.action))


def _measured(block: Block, merged: Tensor) -> tuple[float, float]:
    """Return the squares of what was to be changed and of what rounding missed.

    The block's change is used up, so that no further block is in memory.
    """
    start, change = block.start, block.change
    if change is None:
        moved, missed = start - block.base, start - merged
        return float(moved.norm()) ** 2, float(missed.norm()) ** 2
    if start is block.base:
        size = float(change.norm())
        exact = change.add_(start)
    else:
        exact = change.add_(start)
        size = float((exact - block.base).norm())
    return size**2, float(exact.sub_(merged).norm()) ** 2


def _check_finite(made: Tensor, base: Tensor, tensor: PlannedTensor) -> None:
    if bool((base.isfinite() & ~made.isfinite()).any()):
        raise ComposeError(
            f"the result holds numbers that are not finite in {tensor.written}",
            where=tensor.name,
            hint="`lorahub validate` finds NaN in adapters; a wider --dtype holds larger "
            "numbers",
        )
