"""`reside`: an adapter made ready for a model → its numbers beside the layers, in one slab.

A slab is one allocation that holds every tensor of an adapter without padding between
rows, so that coming, going and moving cost one operation, and its bytes are known before
they are taken. An adapter of a model that is spread over devices has one slab on each.
Where each tensor lies is told by `laid_out.py`, how its numbers come there by `folded.py`.
The views of single layers are made when the adapter is first used (`AtFirstUse`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_hub.adapter.adapter import Replaced
from lora_hub.adapter.update import Update
from lora_hub.composing.linear import cat
from lora_hub.runtime.dtypes import computed_in
from lora_hub.runtime.folded import fill, measure
from lora_hub.runtime.laid_out import Layout, Run, Shaped, Slabs, take
from lora_hub.runtime.layers import Place
from lora_hub.runtime.memory import allocate
from lora_hub.runtime.prepare import Prepared
from lora_hub.runtime.quantised import dtype_of
from lora_hub.runtime.resident import Factors, Key, Resident
from lora_hub.runtime.siblings import grouped
from lora_hub.runtime.sites import Sites

# How many bytes on which device → that much memory, as a flat tensor of bytes.
Allocate = Callable[[int, torch.device], Tensor]

_VECTORS = ("p", "q", "bias", "bias_scale")


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


class Plan:
    """Where each tensor of an adapter will lie; nothing is allocated yet.

    Attributes:
        sizes: device → bytes of its slab.
    """

    def __init__(
        self, prepared: Prepared, sites: Sites, device: torch.device | None = None
    ) -> None:
        self._layout, self._updates = _laid_out(prepared, sites, device)
        self.sizes: dict[torch.device, int] = dict(self._layout.sizes)
        self._replaced: dict[Key, tuple[Replaced, Run]] = {}
        self._lay_replaced(prepared, device)

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
        largest = [0.0] * len(self._updates)
        for run in self._layout.runs:
            into = run.within(slabs)
            fill(run, into, self._updates)
            measure(run, into, self._layout.updates, largest)
        replaced: dict[Key, Replaced] = {}
        for where, (given, run) in self._replaced.items():
            tensor = run.within(slabs)[0].copy_(given.tensor)
            replaced[where] = Replaced(tensor, given.role, given.rows)
        most: dict[torch.dtype, float] = {}
        for each, number in zip(self._layout.updates, largest, strict=True):
            most[each.dtype] = max(most.get(each.dtype, 1.0), number)
        at: Mapping[int, Factors] = AtFirstUse(self._layout, slabs, largest)
        experts = {}
        if len(self._layout.sites) != len(self._layout.updates):
            made = factors_in(self._layout, slabs, largest)
            at = {key: each for key, each in made.items() if isinstance(key, int)}
            experts = {key: each for key, each in made.items() if not isinstance(key, int)}
        return Resident(
            name=name,
            key=key,
            at=at,
            experts=experts,
            replaced=replaced,
            tokens=tokens,
            nbytes=self.nbytes,
            devices=frozenset(slab.device for slab in slabs.values()),
            most=most,
        )

    def _lay_replaced(self, prepared: Prepared, where: torch.device | None) -> None:
        known: dict[tuple[int, torch.device], Run] = {}  # tied places share one copy
        for place, given in prepared.replaced.values():
            tensor = given.tensor
            device = where or beside(place, tensor)
            run = known.get((id(tensor), device))
            if run is None:
                begin = take(self.sizes, device, tensor.nbytes)
                shape = tuple(tensor.shape)
                run = Run("", device, tensor.dtype, begin, tensor.nbytes, shape, (0,))
                known[id(tensor), device] = run
            self._replaced[place.module, place.name] = given, run


class AtFirstUse(Mapping[int, Factors]):
    """Site → factors in slabs, made for all sites together when one is first asked for.

    An adapter that is loaded and not used has no tensors but its slabs, so that Python's
    garbage collector has next to nothing to look at, however many are loaded.

    Args:
        layout: of updates each of which has a site.
        slabs: device as the layout calls it → the slab, wherever that is.
        largest: of each update, see `Factors.largest`.
    """

    __slots__ = ("_largest", "_layout", "_made", "_slabs")

    def __init__(self, layout: Layout, slabs: Slabs, largest: Sequence[float]) -> None:
        self._layout = layout
        self._slabs = slabs
        self._largest = largest
        self._made: Mapping[int, Factors] | None = None

    def on(self, slabs: Slabs) -> "AtFirstUse":
        """Return the same in other slabs, which hold the same bytes."""
        return AtFirstUse(self._layout, slabs, self._largest)

    def get(self, number: int, default: Any = None) -> Any:
        return (self._made or self._all()).get(number, default)

    def __getitem__(self, number: int) -> Factors:
        return (self._made or self._all())[number]

    def __contains__(self, number: object) -> bool:
        return number in self._layout.sites

    def __iter__(self) -> Iterator[int]:
        return iter(self._layout.sites)

    def __len__(self) -> int:
        return len(self._layout.sites)

    def _all(self) -> Mapping[int, Factors]:
        # Two threads may both come here: what they make is the same.
        made = factors_in(self._layout, self._slabs, self._largest)
        self._made = {key: each for key, each in made.items() if isinstance(key, int)}
        return self._made


# Tensors that are good outside of inference mode, whoever asks for them first.
@torch.inference_mode(False)
@torch.no_grad()
def factors_in(
    layout: Layout, slabs: Slabs, largest: Sequence[float]
) -> dict[int | Key, Factors]:
    """Return the factors of every update, as views of the slabs."""
    tensors: list[dict[str, Any]] = [{} for _ in layout.updates]
    for run in layout.runs:
        for index, tensor in zip(run.of, run.within(slabs).unbind(), strict=True):
            tensors[index][run.name] = tensor
    return {
        each.key: Factors(
            **given, layer=each.layer, kernel=each.kernel, largest=largest[index]
        )
        for index, (each, given) in enumerate(zip(layout.updates, tensors, strict=True))
    }


def beside(place: Place, given: Tensor) -> torch.device:
    """Return the device on which the layer computes, else that of `given`."""
    device = place.tensor.device
    if device.type != "meta":
        return device
    # accelerate brings the weight of a layer when it is called.
    hook = getattr(place.module, "_hf_hook", None)
    execution = getattr(hook, "execution_device", None)
    return given.device if execution is None else torch.device(execution)


def _laid_out(
    prepared: Prepared, sites: Sites, where: torch.device | None
) -> tuple[Layout, list[Update]]:
    """Return the layout, and the updates in its order."""
    alike = prepared.alike
    if alike is None:
        return _newly_laid_out(prepared, sites, where)
    # The weights may have been moved or brought to another dtype.
    known = sites, where, alike.weights()
    for its, layout in alike.layouts:
        if its == known:
            return layout, [prepared.update(each.target) for each in layout.updates]
    layout, updates = _newly_laid_out(prepared, sites, where)
    alike.layouts[:] = [(known, layout), *alike.layouts[:1]]
    return layout, updates


def _newly_laid_out(
    prepared: Prepared, sites: Sites, where: torch.device | None
) -> tuple[Layout, list[Update]]:
    joined = _by_module(prepared)
    shaped = {
        target: _shaped(target, *each, sites, where) for target, each in joined.items()
    }
    layout = Layout([shaped[target] for target in group] for group in grouped(joined))
    return layout, [joined[each.target][1] for each in layout.updates]


def _shaped(
    target: str,
    place: Place,
    update: Update,
    dtype: torch.dtype,
    sites: Sites,
    where: torch.device | None,
) -> Shaped:
    is_experts = update.layer == "experts"
    return Shaped(
        target=target,
        key=(place.module, place.name) if is_experts else sites.number(place.module),
        device=where or beside(place, update.a),
        dtype=dtype,
        layer=update.layer,
        kernel=update.kernel,
        a=tuple(update.a.shape),
        b=tuple(update.b.shape),
        given=(update.b.dtype, update.b.device),
        vectors=tuple(
            (name, len(vector))
            for name in _VECTORS
            if (vector := getattr(update, name)) is not None
        ),
    )


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
        dtype = computed_in(
            dtype_of(place.tensor, place.module), aimed.dtype if update.rank else None
        )
        first = names.setdefault((place.module, place.name), target)
        if first in found:
            _, other, dtype_of_other = found[first]
            update = cat([(other, 1.0), (update, 1.0)])
            dtype = torch.promote_types(dtype, dtype_of_other)
        found[first] = place, update, dtype
    return found
