"""What is known of an adapter before its numbers are read, for all that are built alike.

Where an adapter acts and how its slab is laid out follow from its targets and shapes and
from how the model is put together. So the second adapter of a structure is only filled in.
Kept is what is plain: products on linear layers, no magnitude and nothing replaced. The
model is looked at each time; once it is put together in another way, nothing is kept.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lora_hub.adapter.adapter import Adapter
from lora_hub.runtime.layers import Place

# Kinds of adapters of one model that are kept; each takes about 0.1 MB.
STRUCTURES = 32

Structure = tuple[object, ...]


def structure_of(adapter: Adapter) -> Structure | None:
    """Return what adapters that are built alike have in common; None for one not plain.

    Those with tensors of another dtype, or on another device, are built in another way.
    """
    if adapter.replaced or adapter.alora_tokens:
        return None
    found: list[object] = []
    for target, update in adapter.updates.items():
        a, b = update.a, update.b
        if update.layer != "linear" or not (
            update.magnitude is None
            and update.p is None
            and update.q is None
            and update.bias is None
            and update.bias_scale is None
        ):
            return None
        found += target, a.shape, b.shape, a.dtype, b.dtype, b.device
    return tuple(found)


class Alike:
    """What adapters of one structure have in common on one model.

    Attributes:
        places: target → where it acts, no two of them the same.
        notes: what a person should hear.
        modules: on which they act.
        layouts: what a layout depends on, and the layout (`slab.py`).
    """

    def __init__(self, places: Mapping[str, Place], notes: tuple[str, ...]) -> None:
        self.places = places
        self.notes = notes
        self.modules = tuple(place.module for place in places.values())
        self.layouts: list[tuple[Any, Any]] = []
        self._weights = [
            (place.module._parameters, place.name)  # noqa: SLF001  (getattr takes longer)
            for place in places.values()
        ]
        self._shapes = self._shapes_now()

    @property
    def is_plain(self) -> bool:
        """Whether each layer is there once, and its weight nothing but numbers."""
        weights = [home.get(name) for home, name in self._weights]
        return len(set(self.modules)) == len(self.modules) and all(
            type(weight) is nn.Parameter and weight.is_floating_point()
            for weight in weights
        )

    @property
    def fits(self) -> bool:
        """Whether the layers are of the kinds and widths they were of."""
        return self._shapes == self._shapes_now()

    def weights(self) -> list[object]:
        """Return dtype and device of each weight, as they are now."""
        found = [home.get(name) for home, name in self._weights]
        return [
            weight if weight is None else (weight.dtype, weight.device) for weight in found
        ]

    def _shapes_now(self) -> list[object]:
        widths = [
            (type(module), held.get("in_features"), held.get("out_features"))
            for module in self.modules
            for held in (module.__dict__,)
        ]
        found = [home.get(name) for home, name in self._weights]
        return [widths, [None if each is None else each.shape for each in found]]


class Structures:
    """What is known of the structures that adapters of a model have had."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._assembly: Assembly | None = None
        self._known = Known()

    def now(self) -> "Known":
        """Return what is known of the model as it is put together now."""
        if self._assembly is None or not self._assembly.is_still:
            self._known = Known()
            self._assembly = Assembly(self._model)
        return self._known


class Known:
    """Structures of adapters, the latest of them, of a model that stays as it is."""

    def __init__(self) -> None:
        self._found: OrderedDict[Structure, Alike] = OrderedDict()

    def find(self, structure: Structure) -> Alike | None:
        """Return what is known of adapters of this structure."""
        found = self._found.get(structure)
        return found if found is not None and found.fits else None

    def keep(
        self, structure: Structure, places: Mapping[str, Place], notes: tuple[str, ...]
    ) -> Alike | None:
        """Return what was found, kept; None where it is not of the kind that is kept."""
        alike = Alike(places, notes)
        if not alike.is_plain:
            return None
        found = self._found
        found[structure] = alike
        while len(found) > STRUCTURES:
            found.popitem(last=False)
        return alike


class Assembly:
    """How a model is put together: which modules and tensors it has, under which names.

    Told by where they lie in memory, so that nothing is kept alive here. That is enough:
    layers of which places are known are kept by these, so that nothing else comes to lie
    there, and of tensors it matters which of them are one.
    """

    def __init__(self, model: nn.Module) -> None:
        self._homes: Sequence[Mapping[str, object]] = [
            home
            for module in model.modules()
            for home in (module._modules, module._parameters, module._buffers)  # noqa: SLF001
        ]
        self._held = self._held_now()

    @property
    def is_still(self) -> bool:
        """Whether it is put together as it was."""
        return self._held == self._held_now()

    def _held_now(self) -> tuple[list[int], list[str], list[int]]:
        homes = self._homes
        names = [name for home in homes if home for name in home]
        held = [id(each) for home in homes if home for each in home.values()]
        return [len(home) for home in homes], names, held
