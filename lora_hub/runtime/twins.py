"""`Twins`: the modules of a model that run with other tensors while some adapters act.

For what nothing added to an output can do: tensors that an adapter replaces, and experts.
Such a module gets a forward of its own, which asks what acts on the thread that calls it
and runs a twin of the module (`twin.py`), one for each set of adapters on that set's rows.
What is added to outputs (LoRA on the same head) comes afterwards, to the whole output.
"""

from collections.abc import Callable, Mapping

from torch import nn

from lora_hub.runtime.replaced import dropped_of
from lora_hub.runtime.route import Set
from lora_hub.runtime.sites import Sites
from lora_hub.runtime.stand_in import StandIn
from lora_hub.runtime.step import Step


class Twins:
    """The forwards put on modules of one model.

    Args:
        model: whose modules they are; asked for paths where a message needs one.
        sites: the numbers of its layers, as residents name them.
        current: gives the step that runs on the thread that asks; outside of the model's
            forward one with the route in force and no shape.
    """

    def __init__(self, model: nn.Module, sites: Sites, current: Callable[[], Step]) -> None:
        self._model = model
        self._sites = sites
        self._current = current
        self._stand_ins: dict[nn.Module, StandIn] = {}

    def __bool__(self) -> bool:
        """Whether any module has a forward of ours that is not asleep."""
        return any(each.is_on for each in self._stand_ins.values())

    @property
    def kept_bytes(self) -> int:
        """Bytes of new tensors that are kept beside the model's own."""
        return sum(each.tensors.kept_bytes for each in self._stand_ins.values())

    def put_on(self, acting: Set) -> bool:
        """Give each module that the set needs to run otherwise its forward.

        Modules of other sets keep theirs, so that several sets can be in force. On any
        error nothing is changed.

        Args:
            acting: adapters with their weights, as they will act together on a row.

        Returns:
            Whether a module got one that had none, so that compiled code must be made anew.

        Raises:
            ComposeError: a number is not finite in the dtype which is computed in; or a
                tensor that is no floating-point one would be weighted.
            FitError: a module's forward cannot be run with other tensors, or its tensor
                is held in a form that cannot be replaced.
        """
        numbers = self._numbers(acting)
        found = []
        for module in _modules(acting):
            stand_in = self._stand_ins.get(module)
            if stand_in is None or not stand_in.is_in_place():
                stand_in = StandIn(
                    module,
                    self._current,
                    self._path(module),
                    is_read_along=self._is_read_along(module),
                )
            site = numbers.get(module, stand_in.tensors.site)
            stand_in.tensors.check(acting, site, self._path)
            found.append((module, stand_in, site))
        is_new = not all(each.is_on for _, each, _ in found)
        for module, stand_in, site in found:
            stand_in.tensors.site = site
            stand_in.put_on()
            self._stand_ins[module] = stand_in
        return is_new

    def take_off(self) -> None:
        """Give every module its own forward back; its `__dict__` is as it was.

        Where another tool wrapped ours since then, ours stays inside and does nothing.
        """
        for module, stand_in in tuple(self._stand_ins.items()):
            if stand_in.take_off():
                del self._stand_ins[module]

    def dropped(self, acting: Set) -> Mapping[int, frozenset[str]]:
        """Return site → which of p, q and bias_scale its layer's tensors have in them.

        They must be left out of what the set adds to that layer's output.
        """
        numbers = self._numbers(acting)
        found = {
            numbers[module]: dropped_of(acting, module)
            for module in _modules(acting)
            if module in numbers
        }
        return {number: names for number, names in found.items() if names}

    def _numbers(self, acting: Set) -> dict[nn.Module, int]:
        """Return module → number, of all layers that the set adds to."""
        return {
            self._sites[number]: number for resident, _ in acting for number in resident.at
        }

    def _is_read_along(self, module: nn.Module) -> bool:
        """Return whether torch's own encoder reads it in one go, if nobody has a hook."""
        return any(
            module in layer.modules()
            for layer in self._model.modules()
            if isinstance(layer, nn.TransformerEncoderLayer)
        )

    def _path(self, module: nn.Module, name: str = "") -> str:
        for path, each in self._model.named_modules():
            if each is module:
                return ".".join(part for part in (path, name) if part)
        return f"{type(module).__name__}.{name}"


def _modules(acting: Set) -> list[nn.Module]:
    keys: dict[nn.Module, None] = {}
    for resident, _ in acting:
        keys.update((module, None) for module, _ in (*resident.replaced, *resident.experts))
    return list(keys)
