"""Products of factors by the grouped kernels, for linear layers on a GPU.

Where rows of a batch use adapters of their own, torch takes four launches an adapter and
layer; the kernels take two a layer, whatever the rows use, and one of them is shared by
layers that read one input. What they do not compute goes torch's way (`effect.py`): updates
that are more than a product, other kinds of layers, gradients. One adapter on all rows is a
plain matrix product, which torch's libraries are made for: "auto" leaves it to them.

Both compute the same and round in another order.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from lora_hub.errors import InputError
from lora_hub.kernels.grouped import expand_grouped, is_available, shrink_grouped
from lora_hub.kernels.rows import RowLists
from lora_hub.kernels.table import Table
from lora_hub.runtime.resident import Resident
from lora_hub.runtime.route import Route
from lora_hub.runtime.siblings import grouped
from lora_hub.runtime.sites import Sites
from lora_hub.runtime.slots import KINDS, Slots, is_linear
from lora_hub.runtime.step import Step

Kernels = Literal["auto", "triton", "torch"]


class Product:
    """The products of all adapters of a route at one site.

    Args:
        numbers: of the sites that may share a launch with this one, itself among them.
        lists: what the rows use, on the device that is asked for.
    """

    __slots__ = ("_device", "_index", "_lists", "_number", "_numbers", "_table")

    def __init__(
        self,
        table: Table,
        number: int,
        numbers: tuple[int, ...],
        lists: Callable[[torch.device], RowLists],
    ) -> None:
        self._table = table
        self._device = table.cells.device
        self._number = number
        self._numbers = numbers
        self._index = numbers.index(number)
        self._lists = lists

    def takes(self, x: Tensor, y: Tensor) -> bool:
        """Return whether the kernels can compute this."""
        return (
            type(x) is Tensor
            and type(y) is Tensor
            and x.device == y.device == self._device
            and x.dtype in KINDS
            and y.dtype in KINDS
            and not (torch.is_grad_enabled() and (x.requires_grad or y.requires_grad))
        )

    def add(self, step: Step | None, x: Tensor, y: Tensor) -> None:
        """Add to y, contiguous, in place."""
        rows = self._lists(self._device)
        t = self._own(x, rows) if step is None else self._shared(step, x, rows)
        expand_grouped(y, t, self._table, self._number, rows)

    def _own(self, x: Tensor, rows: RowLists) -> Tensor:
        return shrink_grouped(x, self._table, (self._number,), rows)[0]

    def _shared(self, step: Step, x: Tensor, rows: RowLists) -> Tensor:
        """Return x times the `a` of this layer, computed by whichever sibling is first."""
        numbers = self._numbers
        if len(numbers) == 1 or x.is_inference():  # to which writes are not counted
            return self._own(x, rows)
        key = self._table, numbers
        kept = step.shared.get(key)
        version = x._version  # noqa: SLF001  (torch's own name)
        is_last = self._index == len(numbers) - 1
        if kept is None or kept[0] is not x or kept[1] != version or kept[2] is not rows:
            if is_last:  # the others were given another input, or never ran
                return self._own(x, rows)
            kept = x, version, rows, shrink_grouped(x, self._table, numbers, rows)
            step.shared[key] = kept
        elif is_last:
            del step.shared[key]  # which lets go of the input, too
        found: Tensor = kept[3][self._index]
        return found


class Products:
    """What the kernels compute on one model.

    Args:
        sites: the model's layers by number.
        model: where they are, so that siblings are known.
        is_always: whether they also compute what is one product for all rows.
    """

    def __init__(self, sites: Sites, model: nn.Module, *, is_always: bool) -> None:
        self.slots = Slots(sites)
        self._sites = sites
        self._model = model
        self._is_always = is_always
        self._siblings: dict[int, tuple[int, ...]] = {}
        self._available: dict[torch.device, bool] = {}

    @classmethod
    def of(cls, model: nn.Module, sites: Sites, kernels: Kernels) -> "Products | None":
        """Return what is asked for, None where nothing is for the kernels.

        Raises:
            InputError: the kernels do not run where the model is and are asked for by name.
        """
        if kernels == "torch":
            return None
        devices = {parameter.device for parameter in model.parameters()}
        if any(is_available(device) for device in devices):
            return cls(sites, model, is_always=kernels == "triton")
        if kernels == "triton":
            where = ", ".join(sorted(map(str, devices))) or "no device"
            raise InputError(
                f"the model is on {where}, where Triton's kernels do not run",
                hint="they need Triton and an NVIDIA GPU since Ampere; kernels='auto' "
                "takes them where they run",
            )
        return None

    def at(self, route: Route, number: int, residents: set[Resident]) -> Product | None:
        """Return what computes all that the route does at the site; None where torch does.

        Args:
            route: what acts.
            number: of the site.
            residents: all that act there.
        """
        is_one = len(residents) == 1 and route.total is None
        device = next(iter(residents)).at[number].bt.device
        if (is_one and not self._is_always) or not self._runs_on(device):
            return None
        slots = self.slots.of(residents)
        if not all(number in slot.sites for slot in slots.values()):
            return None
        acting = route.sites
        numbers = tuple(each for each in self.siblings(number) if each in acting)
        return self.product(device, number, numbers, self.slots.lists(route).on)

    def product(
        self,
        device: torch.device,
        number: int,
        numbers: tuple[int, ...],
        lists: Callable[[torch.device], RowLists],
    ) -> Product:
        """Return a product at a site; siblings whose factors lie elsewhere take no part."""
        table = self.slots.table(device, self._sites[number])
        same = tuple(
            each
            for each in numbers
            if each == number or self.slots.table(device, self._sites[each]) is table
        )
        return Product(table, number, same, lists)

    def siblings(self, number: int) -> tuple[int, ...]:
        """Return the sites known by now that may read this one's input, it among them."""
        if number not in self._siblings:
            numbers = {self._sites[each]: each for each in range(len(self._sites))}
            paths = {
                path: numbers[module]
                for path, module in self._model.named_modules()
                if module in numbers and is_linear(module)
            }
            self._siblings = {each: (each,) for each in numbers.values()}
            for group in grouped(paths):
                found = tuple(paths[path] for path in group)
                if self._share(found):
                    self._siblings.update(dict.fromkeys(found, found))
        return self._siblings[number]

    def _share(self, numbers: tuple[int, ...]) -> bool:
        widths = {getattr(self._sites[each], "in_features", None) for each in numbers}
        return 1 < len(numbers) <= 3 and len(widths) == 1 and None not in widths

    def _runs_on(self, device: torch.device) -> bool:
        found = self._available.get(device)
        if found is None:
            found = self._available[device] = is_available(device)
        return found
