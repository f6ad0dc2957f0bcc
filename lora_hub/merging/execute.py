"""Carry out a merge plan: base + adapters → a checkpoint folder, some rows at a time.

For each changed weight the deltas of all adapters are summed in float64, rounded once to
float32, added to the weight in float32 and cast once to the dtype that is written (all in
float64 where that or the base is float64). Tensors that nothing touches keep their bytes,
files keep their names, and the folder appears when it is whole.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

from lora_hub import atomic
from lora_hub.adapter.load import load_update
from lora_hub.adapter.tensor_bytes import TORCH, to_bytes, to_tensor
from lora_hub.adapter.update import Update, delta
from lora_hub.composing.linear import cat
from lora_hub.errors import ComposeError
from lora_hub.merging import files, provenance
from lora_hub.merging.plan import MergePlan, Part, PlannedShard, PlannedTensor
from lora_hub.tensors.checkpoint import Checkpoint, Shard
from lora_hub.tensors.write import write_tensors

# Elements in memory at a time: 8 MiB in float64, of which a handful exist at once.
BLOCK_ELEMENTS = 1 << 20

Progress = Callable[[int, int], None]  # bytes written, bytes in all


@dataclass(frozen=True, slots=True)
class MergedTensor:
    """A weight that was changed.

    `rounding_error` is what the dtype lost of the change: ‖written − W − Δ‖ / ‖Δ‖ in
    Frobenius norms; 0 is exact, and at 1 as much was lost as was added.
    """

    name: str
    dtype: str
    rounding_error: float


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What a merge wrote; `str` of it is for people."""

    out: str
    files: tuple[str, ...]
    size_bytes: int
    tensors: int
    changed: tuple[MergedTensor, ...]

    def __str__(self) -> str:
        worst = max(self.changed, key=lambda tensor: tensor.rounding_error)
        return (
            f"wrote {self.out}: {self.tensors} tensors, {self.size_bytes / 1e6:.1f} MB, "
            f"{len(self.changed)} of them changed\n"
            f"rounding to {worst.dtype} lost at most {worst.rounding_error:.2g} of a "
            f"change ({worst.name})"
        )


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
    with atomic.new_folder(out) as folder:
        for shard, held in zip(plan.shards, base.shards, strict=True):
            run.write(shard, held, folder)
        for name in plan.copied:
            atomic.replace(
                folder / name,
                files.chunks(
                    base.folder / name, dtype=plan.dtype, size_bytes=plan.size_bytes
                ),
            )
        atomic.replace(folder / files.PROVENANCE_NAME, [provenance.encode(plan)])
    return MergeReport(
        out=str(out),
        files=(*(shard.file for shard in plan.shards), *plan.copied, files.PROVENANCE_NAME),
        size_bytes=plan.size_bytes,
        tensors=sum(len(shard.tensors) for shard in plan.shards),
        changed=tuple(run.changed),
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
        self._updates = [
            {f"{update.target}.weight": update for update in part.source.updates}
            for part in parts
        ]
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
        makers = {"copy": self._copied, "cast": self._cast, "add": self._added}
        for chunk in makers[tensor.action](tensor):
            yield chunk
            self._done += chunk.nbytes
            self._progress(self._done, self._total)

    def _copied(self, tensor: PlannedTensor) -> Iterator[memoryview]:
        return self._base.shard_of(tensor.name).file.chunks(tensor.name)

    def _cast(self, tensor: PlannedTensor) -> Iterator[memoryview]:
        for _, block in self._blocks(tensor):
            cast = block.to(TORCH[tensor.written])
            _check_finite(cast, block, tensor)
            yield to_bytes(cast)

    def _added(self, tensor: PlannedTensor) -> Iterator[memoryview]:
        update = self._update(tensor)
        dtypes = (torch.float32, TORCH[tensor.dtype], TORCH[tensor.written])
        wide = reduce(torch.promote_types, dtypes)
        lost = added = 0.0
        for rows, weight in self._blocks(tensor):
            change = delta(update, weight, rows=rows)
            merged = (weight.to(wide) + change.to(wide)).to(TORCH[tensor.written])
            _check_finite(merged, weight, tensor)
            added += float(change.square().sum())
            lost += float(change.add_(weight).sub_(merged).square_().sum())
            yield to_bytes(merged)
        error = math.sqrt(lost / added) if added else 0.0
        self.changed.append(MergedTensor(tensor.name, tensor.written, error))

    def _update(self, tensor: PlannedTensor) -> Update:
        """Return the weighted sum of all that the parts do to a tensor."""
        return cat(
            [
                (
                    load_update(
                        self._parts[index].source.tensors, self._updates[index][tensor.name]
                    ),
                    self._parts[index].weight,
                )
                for index in tensor.parts
            ]
        )

    def _blocks(self, tensor: PlannedTensor) -> Iterator[tuple[slice, Tensor]]:
        """Give some rows of the base's tensor after others, and which they are."""
        columns = math.prod(tensor.shape[1:])
        count = tensor.shape[0] if tensor.shape else 1
        row_bytes = columns * TORCH[tensor.dtype].itemsize
        step = max(1, BLOCK_ELEMENTS // max(1, columns))
        for start in range(0, count, step):
            stop = min(start + step, count)
            data = self._base.read(tensor.name, start * row_bytes, stop * row_bytes)
            if data.nbytes:
                block = to_tensor(data, tensor.dtype, (stop - start, columns))
                yield slice(start, stop), block


def _check_finite(made: Tensor, weight: Tensor, tensor: PlannedTensor) -> None:
    if not torch.equal(torch.isfinite(made), torch.isfinite(weight)):
        raise ComposeError(
            f"the result holds numbers that are not finite in {tensor.written}",
            where=tensor.name,
            hint="`lorahub validate` finds NaN in adapters; a wider --dtype holds larger "
            "numbers",
        )
