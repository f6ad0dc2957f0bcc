"""What a bank counts: bytes taken of a budget, and the figures that are told of it.

Bytes of a slab count from before it is allocated until its memory is freed, which is when
the last tensor in it is let go, wherever that is: in a forward of another thread, or in an
autograd graph. The storage itself tells.
"""

import weakref
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lora_hub import sizes
from lora_hub.runtime import memory

Tier = Literal["device", "host", "disk", "memory"]


class Budget:
    """Bytes taken, of at most `limit`, None for no limit.

    Not safe for threads, but for `allocate`: whoever keeps it has a lock.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self._taken = 0
        # Finalizers may run anywhere, also under a lock: they only leave a number here.
        self._freed: deque[int] = deque()

    @property
    def used_bytes(self) -> int:
        while self._freed:
            self._taken -= self._freed.popleft()
        return self._taken

    def has_room(self, nbytes: int) -> bool:
        return self.limit is None or self.used_bytes + nbytes <= self.limit

    def take(self, nbytes: int) -> None:
        """Count bytes, for which there is room, before they are allocated."""
        self._taken += nbytes

    def give_back(self, nbytes: int) -> None:
        """Stop counting bytes that were taken and never allocated."""
        self._taken -= nbytes

    def allocate(self, size_bytes: int, device: torch.device) -> Tensor:
        """Return memory for bytes that were taken; they are given back when it is freed."""
        slab = memory.allocate(size_bytes, device)
        finalizer = weakref.finalize(slab.untyped_storage(), self._freed.append, size_bytes)
        finalizer.atexit = False
        return slab


@dataclass(frozen=True, slots=True)
class Held:
    """Where an adapter is.

    Attributes:
        name: as it was put.
        nbytes: what it takes, or would take, on the device.
        tier: "device" where it is resident; else what it comes back from: a copy in the
            "host"'s memory, its package on "disk", or the tensors in "memory" that it was
            made of, which are its owner's and in no budget.
        leases: how many hold it.
    """

    name: str
    nbytes: int
    tier: Tier
    leases: int


@dataclass(frozen=True, slots=True)
class Memory:
    """What adapters take; `str` of it is for people.

    Attributes:
        budget: the most bytes on the device, None where there is no limit.
        used_bytes: of slabs, from before they are allocated until they are freed.
        norms_bytes: of DoRA's norms, kept in the host's memory until an adapter is
            dropped; a part of `used_bytes` where it acts on the CPU.
        host_budget: the most bytes of copies in the host's memory.
        host_bytes: of those copies.
        adapters: by key.
    """

    budget: int | None
    used_bytes: int
    norms_bytes: int
    host_budget: int | None
    host_bytes: int
    adapters: Mapping[str, Held]

    def __str__(self) -> str:
        resident = sum(each.tier == "device" for each in self.adapters.values())
        of = "" if self.budget is None else f" of {sizes.to_text(self.budget)}"
        copies = f", {sizes.to_text(self.host_bytes)} of copies" if self.host_bytes else ""
        return (
            f"{resident} of {len(self.adapters)} adapters resident in "
            f"{sizes.to_text(self.used_bytes)}{of}{copies}"
        )
