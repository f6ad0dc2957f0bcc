"""Memory for slabs: taken in one piece, given back to the system as soon as it is let go.

Memory of the process's heap comes in pages of 4 kB, each of which costs a fault when it is
first touched, and may stay with the process when it is freed. So a slab on the CPU is a
mapping of its own, in large pages where the system has them: a slab of 20 MB is there in
1.6 ms and not 7.7 (one thread of a virtual machine, Linux 6.18).
"""

import mmap

import torch
from torch import Tensor

LARGE_PAGE_BYTES = 1 << 21  # of x86 and of Arm with pages of 4 kB
SMALL_BYTES = 1 << 18  # below, the heap may have it


def allocate(size_bytes: int, device: torch.device) -> Tensor:
    """Return memory on the device, as bytes whose values are not settled."""
    if device.type != "cpu" or size_bytes < SMALL_BYTES:
        return torch.empty(size_bytes, dtype=torch.uint8, device=device)
    if not hasattr(mmap, "MADV_HUGEPAGE"):  # no Linux
        return torch.empty(size_bytes, dtype=torch.uint8)
    # Room to begin at a large page; what is not touched takes no memory.
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # shared memory has no large pages
    memory = mmap.mmap(-1, size_bytes + LARGE_PAGE_BYTES, flags=private)
    whole = torch.frombuffer(memory, dtype=torch.uint8)  # keeps it alive
    begin = -whole.data_ptr() % LARGE_PAGE_BYTES
    # But for the end, where a large page would hold more than was asked for.
    large = size_bytes // LARGE_PAGE_BYTES * LARGE_PAGE_BYTES
    if large:
        memory.madvise(mmap.MADV_HUGEPAGE, begin, large)
    return whole[begin : begin + size_bytes]
