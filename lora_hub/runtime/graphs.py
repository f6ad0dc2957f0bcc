"""`Graphs`: what captured CUDA graphs read, so that other adapters act when they replay.

    with host.rows(["a", None]), host.capturing():
        model(tokens)                     # once before: the kernels are compiled
        with torch.cuda.graph(graph):
            out = model(tokens)
    with host.rows(["b", {"a": 0.5, "c": 1}]):
        graph.replay()

A replay runs no Python. It launches what was captured, at the addresses of then: every
linear layer its two kernels, on lists of rows that belong to the host and stay where they
are. What comes into force afterwards is written into them. A graph captured inside of
`rows` has lists of as many rows; one captured outside has a list for all rows. `use` and
`using` speak of all rows and so to both; `rows` to graphs of as many rows alone. Where
several blocks speak to a graph, the one opened last counts, in whatever thread.

What kernels do not compute cannot come into force in a graph, so it is refused by name:
everything that is no plain product at a linear layer which was captured, and what there
is no room for.
"""

import threading
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lora_hub.errors import InputError
from lora_hub.kernels.in_place import refuse_while_capturing
from lora_hub.kernels.rows import RowLists
from lora_hub.runtime.product import Product, Products
from lora_hub.runtime.route import BARE, Route
from lora_hub.runtime.sites import Sites
from lora_hub.runtime.slots import Slots, is_linear, pairs_of, write
from lora_hub.runtime.step import Step
from lora_hub.runtime.which_rows import check_rows

# Graphs may outlive their host and go on reading what they were captured with.
_FOR_GOOD: list[object] = []


@dataclass(slots=True, eq=False, weakref_slot=True)
class Static:
    """The lists of all graphs of one number of rows.

    Attributes:
        total: rows; None for graphs of any rows that all use one set.
        on: device → what graphs read there.
        per_row: the most adapters of one row.
        sites: the layers that all of these graphs have kernels at.
        route: what the lists say; None where they were never written.
        slots: that they name, as of `Lists`.
    """

    total: int | None
    on: dict[torch.device, RowLists]
    per_row: int
    sites: frozenset[int]
    route: Route | None = None
    slots: frozenset[int] = field(default_factory=frozenset)

    def hears(self, route: Route) -> bool:
        return route.total in (None, self.total)

    def write(self, route: Route, slots: Slots) -> None:
        if self.route is route:
            return
        found = slots.of(entry.resident for entry in route.entries)
        sets, of = pairs_of(route, found)
        self.slots = frozenset(slot.number for slot in found.values() if slot.sites)
        for rows in self.on.values():
            if of is None and self.total is not None:
                rows.write_all(sets[0], rows=self.total)
            else:
                write(rows, sets, of)
        self.route = route


class Captured:
    """What a graph does at one linear layer, whatever acts there."""

    is_nothing = False
    __slots__ = ("_number", "_product", "_sites", "_total")

    def __init__(
        self, product: Product, total: int | None, number: int, sites: Sites
    ) -> None:
        self._product = product
        self._total = total
        self._number = number
        self._sites = sites

    @property
    def dtype(self) -> torch.dtype:
        """Refuse what only a backward of compiled code asks for.

        Raises:
            InputError: always.
        """
        raise InputError(
            "what acts through the kernels of a graph has no gradients",
            where=self._sites.path(self._number),
            hint="call backward() outside of `with host.capturing():`",
        )

    def __call__(
        self, step: Step | None, layer: nn.Module, x: Tensor, y: Tensor, *, is_fresh: bool
    ) -> Tensor | None:
        """Add to the layer's output as `Effect` does.

        Raises:
            InputError: the kernels cannot compute this, or which rows of the batch the
                rows of x are is not known.
        """
        if self._total is not None:
            check_rows(step, x, self._total, lambda: self._sites.path(self._number))
        if not self._product.takes(x, y):
            raise InputError(
                f"the layer was given {x.dtype} on {x.device} and gave {y.dtype}, or wants "
                "gradients, which the kernels of a graph do not compute",
                where=self._sites.path(self._number),
                hint="capture under torch.inference_mode(), or leave the layer out with "
                "capturing(reserve=...)",
            )
        out = y if is_fresh else y.clone(memory_format=torch.contiguous_format)
        self._product.add(step, x, out)
        return None if is_fresh else out


class Graphs:
    """What the graphs of one host read."""

    def __init__(self, products: Products, sites: Sites) -> None:
        self._products = products
        self._slots = products.slots
        self._sites = sites
        self._static: dict[int | None, Static] = {}
        self._writing = threading.RLock()
        self._is_stale = False

    def __bool__(self) -> bool:
        return bool(self._static)

    def check(self, route: Route) -> None:
        """Refuse what a graph that will hear of the route cannot do.

        Raises:
            InputError: there is such a thing, or a graph is being captured just now.
        """
        heard = [static for static in self._static.values() if static.hears(route)]
        for static in heard:
            for device in static.on:
                refuse_while_capturing(device)
            self._check(route, static)

    def flip(self, routes: Sequence[Route]) -> None:
        """Write what is in force into the lists.

        Waits for nobody, as a block may end anywhere: who writes already writes again.

        Args:
            routes: all that is in force, what was asked for last, last.
        """
        self._is_stale = bool(self._static)
        while self._is_stale and self._writing.acquire(blocking=False):
            try:
                self._is_stale = False
                for static in tuple(self._static.values()):
                    heard = [route for route in routes if static.hears(route)]
                    static.write(heard[-1] if heard else BARE, self._slots)
            finally:
                self._writing.release()

    def begin(
        self, route: Route, numbers: Iterable[int], *, per_row: int, max_rank: int
    ) -> Route:
        """Return the route to capture with: it acts through lists that stay where they are.

        Args:
            route: what acts, and what tells whether rows use adapters of their own.
            numbers: of the layers that get kernels; those which are not linear get none.
            per_row: room for so many adapters on one row.
            max_rank: room for adapters of this rank.

        Raises:
            InputError: the kernels cannot do what the route does, or graphs of before have
                less room.
        """
        linear = [each for each in dict.fromkeys(numbers) if is_linear(self._sites[each])]
        places = {number: _device(self._sites[number]) for number in linear}
        for number, device in places.items():
            self._slots.table(device, self._sites[number])
        self._slots.reserve(max_rank)
        static = self._room(route.total, set(places.values()), frozenset(linear), per_row)
        self._check(route, static)
        made = Route(route.entries, route.segments, route.total, route.dropped)
        static.write(made, self._slots)
        self._static[route.total] = static
        self._slots.listed.add(static)
        self._slots.is_captured = True
        for table in self._slots.tables:
            table.captured = True
        for rows in static.on.values():
            rows.captured = True
        lists = dict(static.on)  # for the graph, which goes on with these
        for number, device in places.items():
            near = [
                each
                for each in self._products.siblings(number)
                if places.get(each) == device
            ]
            product = self._products.product(device, number, tuple(near), lists.__getitem__)
            made.effects[number] = Captured(product, route.total, number, self._sites)
        return made

    def let_go(self) -> None:
        """Let every graph go on as the base alone, for good."""
        self.flip(())
        if self._static:
            _FOR_GOOD.append((self._slots.tables, self._static))

    def _room(
        self,
        total: int | None,
        devices: Collection[torch.device],
        sites: frozenset[int],
        per_row: int,
    ) -> Static:
        known = self._static.get(total)
        if known is not None:
            if per_row > known.per_row or not known.on.keys() >= set(devices):
                raise InputError(
                    f"a graph of as many rows was captured before, with room for "
                    f"{known.per_row} adapters a row",
                    hint=f"capture with per_row={known.per_row}, or attach anew",
                )
            return Static(total, known.on, known.per_row, known.sites & sites)
        count = total or 1
        on = {
            device: RowLists(device, rows=count, entries=count * per_row, per_row=per_row)
            for device in devices
        }
        return Static(total, on, per_row, sites)

    def _check(self, route: Route, static: Static) -> None:
        for entry in route.entries:
            resident = entry.resident
            slot = self._slots.of([resident])[resident]
            problem = slot.problem
            if slot.number < 0 and problem is None and resident.at:
                problem = "finds no room beside what is in use"
            outside = min(slot.sites - static.sites, default=None)
            if problem is None and outside is not None:
                path = self._sites.path(outside)
                problem = f"changes {path}, which has no kernels in the graph"
            if problem is not None:
                raise InputError(
                    f"the adapter {problem}, which a captured CUDA graph cannot do",
                    where=resident.name,
                    hint="it can with a host that has captured no graph: attach anew",
                )
        most = max((len(segment.set) for segment in route.segments), default=0)
        if most > static.per_row:
            raise InputError(
                f"{most} adapters act on one row, and captured graphs have room for "
                f"{static.per_row}",
                hint=f"capture with host.capturing(per_row={most})",
            )


def _device(layer: nn.Module) -> torch.device:
    found: torch.device = next(layer.parameters()).device
    return found
