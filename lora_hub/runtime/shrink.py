"""One product of an input with the `a` of all layers that read it: q, k and v; gate and up.

A slab keeps the `a` of such layers as consecutive rows of one matrix. The first layer that
runs multiplies its input with all of them and leaves the others their share. Whether they
are given the same input is looked at each time, so a layer that is given another one
computes apart and nothing is assumed of the model. An input that was written to in between
is another one: torch counts writes, but for tensors made in inference mode, of which
nothing is shared.

Limit: what is written through `.data` or a view of another library is not counted.
"""

from collections.abc import Iterator, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from lora_hub.runtime.resident import Factors, Resident
from lora_hub.runtime.step import Step


class Shrink:
    """The share of one layer in the product of its siblings.

    Args:
        at: (inp, ranks of all) the transposed `a` of all siblings.
        ranks: of each.
        index: which of them this layer is.
        group: what the siblings know each other by.
    """

    __slots__ = ("_at", "_group", "_index", "_is_last", "_own", "_ranks")

    def __init__(
        self, at: Tensor, ranks: tuple[int, ...], index: int, group: object
    ) -> None:
        self._at = at
        self._ranks = ranks
        self._index = index
        self._group = group
        self._is_last = index == len(ranks) - 1
        self._own = at.split_with_sizes(ranks, 1)[index]

    def of(
        self, step: Step, x: Float[Tensor, "*batch inp"]
    ) -> Float[Tensor, "tokens rank"]:
        """Return x times this layer's `a`, computed by whichever sibling comes first."""
        if x.is_inference():  # nobody counts what is written to it
            return torch.mm(x.reshape(-1, x.shape[-1]), self._own)
        shared = step.shared
        kept = shared.get(self._group)
        version = x._version  # noqa: SLF001  (torch's own name)
        if kept is None or kept[0] is not x or kept[1] != version:
            t = torch.mm(x.reshape(-1, x.shape[-1]), self._at)
            kept = x, version, t.split_with_sizes(self._ranks, 1)
            if not self._is_last:
                shared[self._group] = kept
        elif self._is_last:
            del shared[self._group]  # which lets go of the input, too
        found: Tensor = kept[2][self._index]
        return found


def shrink_of(resident: Resident, number: int) -> Shrink | None:
    """Return the layer's share, None where it has no siblings in this adapter."""
    if not resident.shrinks:
        # At once: another thread may look meanwhile.
        resident.shrinks.update(dict(_shrinks(resident.at)))
    found: Shrink | None = resident.shrinks[number]
    return found


def _shrinks(at: Mapping[int, Factors]) -> Iterator[tuple[int, Shrink | None]]:
    """Give each site's share; siblings are found by where their `a` lie in memory."""
    lined: list[list[tuple[int, Tensor]]] = []
    end, kind = None, None
    by_address = sorted((own.a.data_ptr(), number) for number, own in at.items())
    for address, number in by_address:
        own = at[number]
        a = own.a
        is_matrix = own.layer == "linear" and a.is_contiguous() and a.numel() > 0
        now = (a.dtype, a.device, a.shape[-1]) if is_matrix else None
        if now is not None and address == end and now == kind:
            lined[-1].append((number, a))
        else:
            lined.append([(number, a)])
        end, kind = address + a.nbytes, now
    for group in lined:
        if len(group) == 1:
            yield group[0][0], None
            continue
        ranks = tuple(len(a) for _, a in group)
        first = group[0][1]
        mark = object()
        whole = first.as_strided((sum(ranks), first.shape[1]), first.stride()).mT
        for index, (number, _) in enumerate(group):
            yield number, Shrink(whole, ranks, index, mark)
