"""Where each tensor of an adapter lies in a slab: settled by shapes, before any number.

Tensors of one kind and shape lie at equal distances, one for each layer that is built
alike, so that all of them are written, read and taken apart by one call (`Run`). Layers
that read one input (`siblings.py`) have their `a` side by side, as consecutive rows of one
matrix; what is no sibling never touches, so that siblings are told by where they lie. An
embedding's `a` is laid out by its rows, (inputs, rank), since rows of it are looked up.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod

import torch
from torch import Tensor

from lora_hub.manifest.document import Layer
from lora_hub.runtime.resident import Key

ALIGNED_BYTES = 64  # as torch aligns what it allocates, and wide loads like it

Slabs = Mapping[torch.device, Tensor]


@dataclass(frozen=True, slots=True)
class Shaped:
    """An update as far as its place in a slab depends on it.

    Attributes:
        target: for messages.
        key: number of its site, or the parameter that holds experts.
        device: beside its layer.
        dtype: that of computing.
        a: shape of `a`.
        b: shape of `b`.
        given: dtype and device of `b` as it was given.
        vectors: name and length of each that is there.
    """

    target: str
    key: int | Key
    device: torch.device
    dtype: torch.dtype
    layer: Layer
    kernel: tuple[int, ...]
    a: tuple[int, ...]
    b: tuple[int, ...]
    given: tuple[torch.dtype, torch.device]
    vectors: tuple[tuple[str, int], ...]

    @property
    def kind(self) -> tuple[object, ...]:
        """What updates have in common whose tensors lie at equal distances."""
        shapes = self.a, self.b, self.vectors
        return self.device, self.dtype, self.layer, *shapes, self.given

    @property
    def row(self) -> tuple[object, ...]:
        """What updates have in common whose `a` can be rows of one matrix."""
        return self.device, self.dtype, self.a[:-2], self.a[-1]


@dataclass(frozen=True, slots=True)
class Run:
    """Tensors of one shape at equal distances in the slab of a device.

    Attributes:
        name: which of an update's tensors they are: a, bt, p, q, bias or bias_scale.
        begin: of the first, in bytes.
        step: from one to the next, in bytes.
        shape: of each, as laid out.
        of: the updates they are of, by their numbers in the layout.
        is_turned: whether each is laid out as its transpose.
    """

    name: str
    device: torch.device
    dtype: torch.dtype
    begin: int
    step: int
    shape: tuple[int, ...]
    of: tuple[int, ...]
    is_turned: bool = False

    def within(self, slabs: Slabs) -> Tensor:
        """Return (of, *shape): all of them, a view of the slab."""
        size = self.dtype.itemsize
        slab = slabs[self.device]
        flat = slab[: len(slab) // size * size].view(self.dtype)
        strides = [1, *accumulate(reversed(self.shape[1:]), lambda one, two: one * two)]
        found = flat.as_strided(
            (len(self.of), *self.shape),
            (self.step // size, *reversed(strides)),
            flat.storage_offset() + self.begin // size,
        )
        return found.mT if self.is_turned else found


def take(sizes: dict[torch.device, int], device: torch.device, size_bytes: int) -> int:
    """Return where so many bytes begin, aligned, behind all that was taken before."""
    begin = sizes.get(device, 0)
    begin += -begin % ALIGNED_BYTES
    sizes[device] = begin + size_bytes
    return begin


class Layout:
    """Where the updates of an adapter lie.

    Args:
        groups: the updates, siblings together.

    Attributes:
        updates: in the order that `Run.of` counts.
        runs: all of them.
        sizes: device → bytes.
        sites: the numbers of the sites among the updates' keys.
    """

    def __init__(self, groups: Iterable[Sequence[Shaped]]) -> None:
        self.sizes: dict[torch.device, int] = {}
        self.updates: list[Shaped] = []
        self.runs: list[Run] = []
        families: dict[tuple[object, ...], list[Sequence[Shaped]]] = {}
        for group in groups:
            families.setdefault(tuple(each.kind for each in group), []).append(group)
        for family in families.values():
            self._lay(family)
        keys = (each.key for each in self.updates)
        self.sites = dict.fromkeys(key for key in keys if isinstance(key, int))

    def _lay(self, family: Sequence[Sequence[Shaped]]) -> None:
        """Give groups that are built alike their places."""
        first, width = len(self.updates), len(family[0])
        for group in family:
            self.updates += group
        of = [tuple(range(first + j, len(self.updates), width)) for j in range(width)]
        for begin, end in _rows(family[0]):
            self._lay_a(family[0][begin:end], of[begin:end])
        for each, numbers in zip(family[0], of, strict=True):
            *front, out, rank = each.b
            self._lay_apart("bt", each, (*front, rank, out), numbers)
            for name, length in each.vectors:
                self._lay_apart(name, each, (length,), numbers)

    def _lay_a(self, siblings: Sequence[Shaped], of: Sequence[tuple[int, ...]]) -> None:
        """Lay the `a` of siblings side by side, and gaps between families of them."""
        sizes = [prod(each.a) * each.dtype.itemsize for each in siblings]
        size = sum(sizes)
        step = size + ALIGNED_BYTES - size % ALIGNED_BYTES
        whole = step * (len(of[0]) - 1) + size
        begin = take(self.sizes, siblings[0].device, whole)
        for each, size, numbers in zip(siblings, sizes, of, strict=True):
            is_turned = each.layer == "embedding"
            shape = (*each.a[:-2], each.a[-1], each.a[-2]) if is_turned else each.a
            run = Run("a", each.device, each.dtype, begin, step, shape, numbers, is_turned)
            self.runs.append(run)
            begin += size

    def _lay_apart(
        self, name: str, each: Shaped, shape: tuple[int, ...], of: tuple[int, ...]
    ) -> None:
        size = prod(shape) * each.dtype.itemsize
        step = size + -size % ALIGNED_BYTES
        begin = take(self.sizes, each.device, step * (len(of) - 1) + size)
        self.runs.append(Run(name, each.device, each.dtype, begin, step, shape, of))


def _rows(group: Sequence[Shaped]) -> list[tuple[int, int]]:
    """Return where in the group those begin and end whose `a` are rows of one matrix."""
    starts = [
        index
        for index, each in enumerate(group)
        if not index or each.row != group[index - 1].row
    ]
    return list(zip(starts, [*starts[1:], len(group)], strict=True))
