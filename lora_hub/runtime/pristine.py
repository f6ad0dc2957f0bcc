"""The base's own numbers of what was merged into, so that they come back bit for bit.

Either as copies in host memory, or as a checkpoint folder that holds the same numbers: each
is compared with the model's before anything is merged, and its digest is kept; what is read
back is compared with that. The folder's files stay open in between.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Shaped
from torch import Tensor

from lora_hub.adapter.tensor_bytes import TORCH, to_bytes, to_tensor
from lora_hub.base.folder import FolderBase
from lora_hub.base.stored import Stored, stored
from lora_hub.errors import IntegrityError, NotFoundError
from lora_hub.runtime.memory import allocate

ALIGNED_BYTES = 64  # numbers lie at multiples of their size
CHUNK_ELEMENTS = 1 << 20  # read, converted and compared at a time


@runtime_checkable
class Pristine(Protocol):
    """The numbers of one tensor as they were."""

    @property
    def nbytes(self) -> int:
        """What they cost in host memory."""
        ...

    def check(self) -> None:
        """Make sure that they can be put back.

        Raises:
            IntegrityError: they are not what they were.
        """
        ...

    def put_back(self, into: Tensor) -> None:
        """Write them into a tensor of their shape and dtype."""
        ...


@runtime_checkable
class Keeper(Protocol):
    """Keeps the numbers of tensors."""

    def take(self, names: Sequence[str], tensor: Tensor) -> Pristine:
        """Return the numbers of the tensor of these names, which nobody changes later."""
        ...

    def close(self) -> None:
        """Let go what is open."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class _Copy:
    """In host memory, laid out as the tensor is."""

    numbers: Tensor

    @property
    def nbytes(self) -> int:
        return self.numbers.nbytes

    def check(self) -> None:
        """Do nothing: nobody else has this memory."""

    def put_back(self, into: Tensor) -> None:
        into.detach().copy_(self.numbers, non_blocking=True)


class InMemory:
    """Keeps copies in host memory; beside a GPU in memory that it reads by itself.

    Args:
        size_bytes: of all tensors to come. Those that lie in one piece on the CPU are
            copied one behind the other, which saves a fault for every page.
    """

    def __init__(self, size_bytes: int = 0) -> None:
        self._size_bytes = size_bytes
        self._room: Tensor | None = None
        self._used = 0

    def take(self, names: Sequence[str], tensor: Tensor) -> _Copy:
        """Return a copy of the tensor's numbers."""
        own = tensor.detach()
        with torch.inference_mode(False):
            if own.is_cpu and own.is_contiguous():
                copy = self._allocate(own.nbytes).view(own.dtype).view(own.shape)
            else:
                copy = torch.empty_like(own, device="cpu", pin_memory=own.is_cuda)
            # In the order of the device's own work, so that what writes next, waits.
            copy.copy_(own, non_blocking=True)
        return _Copy(copy)

    def close(self) -> None:
        """Let the memory go, once nobody has a copy."""
        self._room = None

    def _allocate(self, size_bytes: int) -> Tensor:
        if self._room is None:
            self._room = allocate(self._size_bytes, torch.device("cpu"))
        start = -(-self._used // ALIGNED_BYTES) * ALIGNED_BYTES
        if start + size_bytes > len(self._room):
            return torch.empty(size_bytes, dtype=torch.uint8, device="cpu")
        self._used = start + size_bytes
        return self._room[start : self._used]


@dataclass(frozen=True, slots=True, eq=False)
class _InFiles:
    """In a checkpoint, perhaps as several tensors one behind the other."""

    base: FolderBase
    place: Stored
    dtype: torch.dtype
    digest: str
    nbytes: int = 0

    def check(self) -> None:
        """Read them and compare them with their digest."""
        hasher = hashlib.sha256()
        for piece in _pieces(self.base, self.place, self.dtype):
            hasher.update(to_bytes(piece))
        self._compare(hasher.hexdigest())

    def put_back(self, into: Tensor) -> None:
        own = into.detach()
        whole = torch.empty(own.shape, dtype=own.dtype) if not own.is_contiguous() else own
        flat, start, hasher = whole.view(-1), 0, hashlib.sha256()
        for piece in _pieces(self.base, self.place, self.dtype):
            hasher.update(to_bytes(piece))
            flat[start : start + len(piece)].copy_(piece)
            start += len(piece)
        self._compare(hasher.hexdigest())
        if whole is not own:
            own.copy_(whole)

    def _compare(self, found: str) -> None:
        if found != self.digest:
            raise IntegrityError(
                f"the checkpoint's bytes of {', '.join(self.place.parts)} have digest "
                f"sha256:{found}, at the time of merging they had sha256:{self.digest}",
                where=self.base.where,
                hint="the files were changed while they were needed; load the model anew",
            )


class InCheckpoint:
    """Keeps a checkpoint folder open that holds the model's numbers.

    Where the model was loaded in another dtype than the files have, what is compared and
    put back is what the conversion to the model's dtype gives.

    Raises:
        InputError: the folder is no checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self._base = FolderBase.open(folder)

    def take(self, names: Sequence[str], tensor: Tensor) -> _InFiles:
        """Return where the folder has the tensor's numbers.

        Raises:
            NotFoundError: it has no tensor of one of these names and of this shape.
            IntegrityError: its numbers are others than the model's.
        """
        base = self._base
        found = [stored(base.tensors, base.config, name) for name in names]
        places = [each for each in found if each and each.shape == tuple(tensor.shape)]
        if not places:
            raise NotFoundError(
                f"the checkpoint holds no {names[0]} of shape {list(tensor.shape)}, so "
                "that it could not be restored from there",
                where=base.where,
                hint="name the folder that the model was loaded from, or merge with "
                'keep="memory"',
            )
        place, hasher, start = places[0], hashlib.sha256(), 0
        flat = tensor.detach().reshape(-1)
        for piece in _pieces(base, place, tensor.dtype):
            hasher.update(to_bytes(piece))
            own = flat[start : start + len(piece)].cpu()
            if not torch.equal(own.view(torch.uint8), piece.view(torch.uint8)):
                raise IntegrityError(
                    f"the model's {names[0]} is not what the checkpoint holds, so that it "
                    "could not be restored from there",
                    where=base.where,
                    hint="name the folder that the model was loaded from, or merge with "
                    'keep="memory"',
                )
            start += len(piece)
        return _InFiles(base, place, tensor.dtype, hasher.hexdigest())

    def close(self) -> None:
        """Close the folder's files."""
        self._base.checkpoint.close()


def _pieces(
    base: FolderBase, place: Stored, dtype: torch.dtype
) -> Iterator[Shaped[Tensor, " count"]]:
    """Give the numbers in the order of the files, in the dtype asked for."""
    size = TORCH[place.dtype].itemsize
    for part in place.parts:
        count = prod(base.tensors[part][1])
        for start in range(0, count, CHUNK_ELEMENTS):
            stop = min(start + CHUNK_ELEMENTS, count)
            data = base.checkpoint.read(part, start * size, stop * size)
            with torch.inference_mode(False):
                yield to_tensor(data, place.dtype, (stop - start,)).to(dtype)
