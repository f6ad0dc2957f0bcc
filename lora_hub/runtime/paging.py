"""An adapter's slabs between the host's memory and devices: one copy a slab.

For devices other than the CPU, slabs are first made in memory of the host that is pinned
where the device is a CUDA one, then copied as a whole. What was made stays as the copy to
come back from (`HostCopies`), as far as its budget goes.
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_hub.runtime.memory import allocate
from lora_hub.runtime.resident import Factors, Resident
from lora_hub.runtime.slab import Allocate, AtFirstUse, Plan


@dataclass(frozen=True, slots=True, eq=False)
class Staged:
    """An adapter in the host's memory: device → the slab that is to go there.

    `resident` is made of views of these slabs.
    """

    resident: Resident
    slabs: Mapping[torch.device, Tensor]


def staged(plan: Plan, name: str, key: str, tokens: tuple[int, ...]) -> Staged:
    """Return the adapter in the host's memory.

    Raises:
        ComposeError: as `reside`.
    """
    slabs: dict[torch.device, Tensor] = {}

    def stage(size_bytes: int, device: torch.device) -> Tensor:
        # torch keeps pinned memory that was let go, since pinning is slow.
        slabs[device] = (
            torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)
            if device.type == "cuda"
            else allocate(size_bytes, torch.device("cpu"))
        )
        return slabs[device]

    return Staged(plan.filled(name, key, tokens, stage), slabs)


@torch.inference_mode(False)
@torch.no_grad()
def brought(staged: Staged, allocate: Allocate = allocate) -> Resident:
    """Return the adapter on its devices, copied there and whole."""
    moved = {
        device: (slab, allocate(len(slab), device)) for device, slab in staged.slabs.items()
    }
    for device, (slab, there) in moved.items():
        there.copy_(slab, non_blocking=True)
        if device.type == "cuda":
            # Other threads may run on other streams, which do not wait for this one.
            torch.cuda.current_stream(device).synchronize()
    return onto(staged.resident, moved)


def onto(
    resident: Resident, moved: Mapping[torch.device, tuple[Tensor, Tensor]]
) -> Resident:
    """Return the same views of other slabs.

    Args:
        resident: made of views of the first of each pair.
        moved: device → the slab for it, and the one that takes its place, as large.
    """
    slabs = tuple(moved.values())
    # By where the memory begins: views do not know their slab otherwise.
    homes = {slab.untyped_storage().data_ptr(): (slab, other) for slab, other in slabs}

    def view(tensor: Tensor) -> Tensor:
        if not tensor.numel():
            return tensor.to(slabs[0][1].device)
        slab, other = homes[tensor.untyped_storage().data_ptr()]
        begin = tensor.data_ptr() - slab.data_ptr()
        bytes_ = other[begin : begin + tensor.numel() * tensor.element_size()]
        return bytes_.view(tensor.dtype).as_strided(tensor.shape, tensor.stride())

    def vector(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else view(tensor)

    def factors(each: Factors) -> Factors:
        return replace(
            each,
            a=view(each.a),
            bt=view(each.bt),
            p=vector(each.p),
            q=vector(each.q),
            bias=vector(each.bias),
            bias_scale=vector(each.bias_scale),
        )

    at = resident.at
    return replace(
        resident,
        at=at.on({device: other for device, (_, other) in moved.items()})
        if isinstance(at, AtFirstUse)
        else {site: factors(each) for site, each in at.items()},
        experts={where: factors(each) for where, each in resident.experts.items()},
        replaced={
            where: replace(each, tensor=view(each.tensor))
            for where, each in resident.replaced.items()
        },
        devices=frozenset(other.device for _, other in slabs),
    )


class HostCopies:
    """Adapters in the host's memory, those that were asked for longest ago leaving first.

    Not safe for threads: whoever keeps it has a lock.

    Args:
        budget: the most bytes they may take together; None where there is no limit.
    """

    def __init__(self, budget: int | None) -> None:
        self.budget = budget
        self.used_bytes = 0
        self._kept: OrderedDict[str, Staged] = OrderedDict()

    def __contains__(self, key: str) -> bool:
        return key in self._kept

    def keep(self, key: str, staged: Staged) -> None:
        """Keep a copy, unless it is larger than the budget."""
        self.drop(key)
        size = staged.resident.nbytes
        if self.budget is not None:
            if size > self.budget:
                return
            while self.used_bytes + size > self.budget:
                self.drop(next(iter(self._kept)))
        self._kept[key] = staged
        self.used_bytes += size

    def get(self, key: str) -> Staged | None:
        """Return the copy, which is then the last to leave."""
        found = self._kept.get(key)
        if found is not None:
            self._kept.move_to_end(key)
        return found

    def drop(self, key: str) -> None:
        """Let a copy go, if there is one."""
        staged = self._kept.pop(key, None)
        if staged is not None:
            self.used_bytes -= staged.resident.nbytes
