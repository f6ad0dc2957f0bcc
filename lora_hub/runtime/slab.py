"""`reside`: an adapter made ready for a model → its numbers beside the layers, in one slab.

A slab is one allocation that holds every tensor of an adapter without padding between
rows, so that coming, going and moving cost one operation, and its bytes are known before
they are taken. An adapter of a model that is spread over devices has one slab on each.

Layers that read one input (`siblings.py`) have their `a` side by side, as consecutive rows
of one matrix. An embedding's `a` is laid out by its rows, (inputs, rank), since rows of it
are looked up; it is given as the transpose of that.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite, prod

import torch
from torch import Tensor, nn

from lora_hub.adapter.adapter import Replaced
from lora_hub.adapter.update import Update
from lora_hub.composing.linear import cat
from lora_hub.errors import ComposeError
from lora_hub.runtime.dtypes import computed_in
from lora_hub.runtime.layers import Place
from lora_hub.runtime.memory import allocate
from lora_hub.runtime.prepare import Prepared
from lora_hub.runtime.resident import Factors, Key, Resident
from lora_hub.runtime.siblings import grouped
from lora_hub.runtime.sites import Sites

ALIGNED_BYTES = 64  # as torch aligns what it allocates, and wide loads like it

# How many bytes on which device → that much memory, as a flat tensor of bytes.
Allocate = Callable[[int, torch.device], Tensor]


def reside(
    prepared: Prepared,
    sites: Sites,
    *,
    name: str,
    key: str,
    device: torch.device | None = None,
    tokens: tuple[int, ...] = (),
) -> Resident:
    """Return the adapter ready to act, its numbers copied once into memory of its own.

    Factors are in the dtype that is computed in; scalings are folded into `bt` in float32
    or wider and rounded once. Replaced tensors keep their dtype and bits.

    Args:
        prepared: its factors on any device.
        sites: the layers it adds to get a number there.
        name: what to call it in messages.
        key: its identity.
        device: where all of it goes; each part beside its layer by default.
        tokens: invocation tokens of an aLoRA.

    Raises:
        ComposeError: a number is not finite in the dtype that is computed in.
    """
    return Plan(prepared, sites, device).filled(name, key, tokens)


@dataclass(frozen=True, slots=True)
class _Spot:
    """Where a tensor lies in the slab of a device."""

    device: torch.device
    dtype: torch.dtype
    begin: int  # in bytes
    shape: tuple[int, ...]


@dataclass(slots=True)
class _Laid:
    """An update, with spots for its tensors."""

    target: str
    key: int | Key
    update: Update
    a: _Spot
    bt: _Spot
    vectors: dict[str, _Spot] = field(default_factory=dict)


class Plan:
    """Where each tensor of an adapter will lie; nothing is allocated yet.

    Attributes:
        sizes: device → bytes of its slab.
    """

    def __init__(
        self, prepared: Prepared, sites: Sites, device: torch.device | None = None
    ) -> None:
        self.sizes: dict[torch.device, int] = {}
        self._device = device
        self._laid: list[_Laid] = []
        self._replaced: dict[Key, tuple[Replaced, _Spot]] = {}
        joined = _by_module(prepared)
        for group in grouped(joined):
            self._lay([(target, *joined[target]) for target in group], sites)
        self._lay_replaced(prepared)

    @property
    def nbytes(self) -> int:
        return sum(self.sizes.values())

    # Not in inference mode, whose tensors could not be used in training afterwards.
    @torch.inference_mode(False)
    @torch.no_grad()
    def filled(
        self,
        name: str,
        key: str,
        tokens: tuple[int, ...] = (),
        allocate: Allocate = allocate,
    ) -> Resident:
        """Return the adapter in slabs; see `reside`."""
        slabs = {device: allocate(size, device) for device, size in self.sizes.items()}
        views = _Views(slabs)
        made = [_filled(each, views) for each in self._laid]
        largest = _largest(self._laid, made)
        factors = {
            laid.key: Factors(
                **tensors,
                layer=laid.update.layer,
                kernel=laid.update.kernel,
                largest=largest[index],
            )
            for index, (laid, tensors) in enumerate(zip(self._laid, made, strict=True))
        }
        replaced: dict[Key, Replaced] = {}
        for where, (given, spot) in self._replaced.items():
            tensor = views.at(spot).copy_(given.tensor)
            replaced[where] = Replaced(tensor, given.role, given.rows)
        return Resident(
            name=name,
            key=key,
            at={each: made for each, made in factors.items() if isinstance(each, int)},
            experts={
                each: made for each, made in factors.items() if not isinstance(each, int)
            },
            replaced=replaced,
            tokens=tokens,
            nbytes=self.nbytes,
        )

    def _lay(
        self, group: Sequence[tuple[str, Place, Update, torch.dtype]], sites: Sites
    ) -> None:
        """Give siblings their spots, those of `a` side by side where that can be."""
        before = None
        spots = []
        for _, place, update, dtype in group:
            device = self._beside(place, update.a)
            shape = tuple(update.a.shape)
            kind = device, dtype, shape[:-2], shape[-1]
            shape = (shape[1], shape[0]) if update.layer == "embedding" else shape
            spots.append(self._spot(device, dtype, shape, packed=kind == before))
            before = kind
        for (target, place, update, dtype), a in zip(group, spots, strict=True):
            is_experts = update.layer == "experts"
            *front, out, rank = update.b.shape
            laid = _Laid(
                target,
                (place.module, place.name) if is_experts else sites.number(place.module),
                update,
                a,
                self._spot(a.device, dtype, (*front, rank, out)),
            )
            for name, vector in _vectors(update):
                laid.vectors[name] = self._spot(a.device, dtype, tuple(vector.shape))
            self._laid.append(laid)

    def _lay_replaced(self, prepared: Prepared) -> None:
        known: dict[tuple[int, torch.device], _Spot] = {}  # tied places share one copy
        for place, given in prepared.replaced.values():
            tensor = given.tensor
            device = self._beside(place, tensor)
            spot = known.get((id(tensor), device))
            if spot is None:
                spot = self._spot(device, tensor.dtype, tuple(tensor.shape))
                known[id(tensor), device] = spot
            self._replaced[place.module, place.name] = given, spot

    def _beside(self, place: Place, given: Tensor) -> torch.device:
        if self._device is not None:
            return self._device
        device = place.tensor.device
        return device if device.type != "meta" else _called_on(place.module, given.device)

    def _spot(
        self,
        device: torch.device,
        dtype: torch.dtype,
        shape: tuple[int, ...],
        *,
        packed: bool = False,
    ) -> _Spot:
        begin = self.sizes.get(device, 0)
        if not packed:
            begin += -begin % ALIGNED_BYTES
        self.sizes[device] = begin + prod(shape) * dtype.itemsize
        return _Spot(device, dtype, begin, shape)


class _Views:
    """Tensors in slabs, by their spots."""

    def __init__(self, slabs: Mapping[torch.device, Tensor]) -> None:
        self._slabs = slabs
        self._typed: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def at(self, spot: _Spot) -> Tensor:
        where = spot.device, spot.dtype
        typed = self._typed.get(where)
        if typed is None:
            slab = self._slabs[spot.device]
            whole = len(slab) // spot.dtype.itemsize * spot.dtype.itemsize
            typed = self._typed[where] = slab[:whole].view(spot.dtype)
        begin = spot.begin // spot.dtype.itemsize
        return typed[begin : begin + prod(spot.shape)].view(spot.shape)


def _filled(laid: _Laid, views: _Views) -> dict[str, Tensor]:
    """Write one update into its spots and return the tensors there."""
    update = laid.update
    a, bt = views.at(laid.a), views.at(laid.bt)
    if update.layer == "embedding":
        a = a.mT
    a.copy_(update.a)
    b = update.b.mT.to(bt.device)
    # To the dtype first: not every device has float64. The product is made in the widest
    # of what is given here and rounded when it is written.
    fold = torch.promote_types(torch.promote_types(bt.dtype, torch.float32), b.dtype)
    scaling = update.scaling.to(fold).to(bt.device)
    torch.mul(b, scaling[:, None], out=bt)
    tensors = {"a": a, "bt": bt}
    for name, vector in _vectors(update):
        tensors[name] = views.at(laid.vectors[name]).copy_(vector)
    return tensors


def _largest(laid: Sequence[_Laid], made: Sequence[Mapping[str, Tensor]]) -> list[float]:
    """Return the largest absolute number of each update, but for `a`.

    Raises:
        ComposeError: one is not finite.
    """
    owned = [
        (index, name, tensor)
        for index, tensors in enumerate(made)
        for name, tensor in tensors.items()
        if tensor.numel()
    ]
    largest = [0.0] * len(made)
    for (index, name, tensor), norm in zip(owned, _norms(owned), strict=True):
        if not isfinite(norm):
            raise ComposeError(
                f"the adapter has numbers that are not finite in {tensor.dtype}, which is "
                "computed in",
                where=laid[index].target,
                hint="`lorahub validate` finds NaN in adapters",
            )
        if name != "a":
            largest[index] = max(largest[index], norm)
    return largest


def _norms(owned: Sequence[tuple[int, str, Tensor]]) -> list[float]:
    """Return the largest absolute number of each tensor, NaN where there is one."""
    # aminmax reads memory once and as fast as it comes; a norm took forty times as long.
    ends = [torch.aminmax(tensor) for _, _, tensor in owned]
    norms = [0.0] * len(owned)
    alike: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for index, (_, _, tensor) in enumerate(owned):
        alike.setdefault((tensor.dtype, tensor.device), []).append(index)
    for indices in alike.values():
        both = torch.stack([end for index in indices for end in ends[index]])
        largest = both.abs().reshape(-1, 2).amax(dim=1).tolist()
        for index, norm in zip(indices, largest, strict=True):
            norms[index] = norm
    return norms


def _vectors(update: Update) -> Iterator[tuple[str, Tensor]]:
    for name in ("p", "q", "bias", "bias_scale"):
        vector = getattr(update, name)
        if vector is not None:
            yield name, vector


def _by_module(
    prepared: Prepared,
) -> dict[str, tuple[Place, Update, torch.dtype]]:
    """Return target → what acts there, one for each module, in the dtype of computing.

    A module that the model has under two names may be a target twice: both act.
    """
    names: dict[tuple[nn.Module, str], str] = {}
    found: dict[str, tuple[Place, Update, torch.dtype]] = {}
    for target, aimed in prepared.updates.items():
        place, update = aimed.place, aimed.update
        dtype = computed_in(place.tensor.dtype, aimed.dtype if update.rank else None)
        first = names.setdefault((place.module, place.name), target)
        if first in found:
            _, other, dtype_of_other = found[first]
            update = cat([(other, 1.0), (update, 1.0)])
            dtype = torch.promote_types(dtype, dtype_of_other)
        found[first] = place, update, dtype
    return found


def _called_on(module: nn.Module, otherwise: torch.device) -> torch.device:
    """Return where accelerate computes a layer whose weight it brings when it is called."""
    hook = getattr(module, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    return otherwise if device is None else torch.device(device)
