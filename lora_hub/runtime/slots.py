"""`Slots`: where the kernels find the factors of each resident adapter.

The grouped kernels read tables on the device (`kernels/table.py`): slot × site → factors. A
resident gets a slot when a route first needs it and keeps it as long as it lives; then the
number is another's. Tables do not keep factors alive: a route does, with its residents, and
rows name no slot that their route does not hold.

Only plain products of linear layers lie in tables. Why something else does not is kept as
a sentence, for whoever must refuse it (`graphs.py`).
"""

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from lora_hub.kernels.rows import RowLists
from lora_hub.kernels.table import ALIGNED_BYTES, MOST_ELEMENTS, Table
from lora_hub.runtime.added import is_conv1d
from lora_hub.runtime.resident import Factors, Resident
from lora_hub.runtime.route import Route, Set
from lora_hub.runtime.sites import Sites

HALVES = (torch.bfloat16, torch.float16)
KINDS = (torch.float32, *HALVES)


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """One adapter's line of the tables.

    Attributes:
        number: of the line; -1 where the tables have no room for it.
        sites: where its factors are in a table.
        rank: the largest of them.
        problem: the first thing it does that the kernels do not, in words.
    """

    number: int
    sites: frozenset[int]
    rank: int
    problem: str | None


class Names(Protocol):
    """What names slots, which are then not given to others."""

    @property
    def slots(self) -> frozenset[int]: ...


class Lists:
    """What the kernels read of one route, on each device it comes to; see `RowLists`.

    Attributes:
        slots: that its rows name.
    """

    __slots__ = ("__weakref__", "_of", "_on", "_sets", "_width", "slots")

    def __init__(self, route: Route, slots: Mapping[Resident, Slot]) -> None:
        self._sets, self._of = pairs_of(route, slots)
        self.slots = frozenset(slot.number for slot in slots.values() if slot.sites)
        ranks = {slot.number: slot.rank for slot in slots.values()}
        sums = (sum(ranks[number] for number, _ in pairs) for pairs in self._sets)
        self._width = max(1, *sums, 1)
        self._on: dict[torch.device, _Ordered] = {}

    def on(self, device: torch.device) -> RowLists:
        """Return the lists on the device, written when they are first asked for."""
        found = self._on.get(device)
        if found is None:
            rows = RowLists(
                device,
                rows=len(self._of or (0,)),
                entries=max(1, sum(map(len, self._sets))),
                per_row=max(1, *map(len, self._sets), 1),
                width=self._width,
            )
            write(rows, self._sets, self._of)
            found = self._on[device] = _Ordered(rows)
        return found.on_this_stream()


class _Ordered:
    """Lists that any stream may read which has waited for them to be written."""

    __slots__ = ("_event", "_known", "_rows")

    def __init__(self, rows: RowLists) -> None:
        self._rows = rows
        if rows.device.type == "cuda":
            stream = torch.cuda.current_stream(rows.device)
            self._event = stream.record_event()
            self._known = {stream.cuda_stream}

    def on_this_stream(self) -> RowLists:
        if self._rows.device.type == "cuda":
            stream = torch.cuda.current_stream(self._rows.device)
            if stream.cuda_stream not in self._known:
                stream.wait_event(self._event)
                self._known.add(stream.cuda_stream)
        return self._rows


# A slot with a weight each; None in place of rows means one set for all rows.
Pairs = tuple[tuple[int, float], ...]


def pairs_of(
    route: Route, slots: Mapping[Resident, Slot]
) -> tuple[list[Pairs], list[int] | None]:
    """Return the sets of the route, and for each row which of them it uses.

    None in place of the rows means that all of them use the one set there is.
    """

    def pairs(acting: Set) -> Pairs:
        return tuple(
            (slots[resident].number, weight)
            for resident, weight in acting
            if slots[resident].sites
        )

    sets = [pairs(segment.set) for segment in route.segments] or [()]
    if route.total is None:
        return sets, None
    of = [0] * route.total
    for number, segment in enumerate(route.segments):
        for row in segment.rows or ():
            of[row] = number
    return sets, of


def write(rows: RowLists, sets: list[Pairs], of: list[int] | None) -> None:
    """Write into lists what `pairs_of` gives."""
    if of is None:
        rows.write_all(sets[0], rows=1)
    else:
        rows.write([sets[number] for number in of])


class Slots:
    """The tables of a model, one for each device and dtype of layers."""

    def __init__(self, sites: Sites) -> None:
        self.sites = sites
        self._tables: dict[tuple[torch.device, torch.dtype], Table] = {}
        self._of: WeakKeyDictionary[Resident, Slot] = WeakKeyDictionary()
        self._asked: dict[int, int] = {}  # number → when it was asked for last
        self._turn = 0
        self._lists: WeakKeyDictionary[Route, Lists] = WeakKeyDictionary()
        self.listed: WeakSet[Names] = WeakSet()
        self._lock = threading.RLock()
        self.is_captured = False

    def of(self, residents: Iterable[Resident]) -> dict[Resident, Slot]:
        """Return the residents' slots; each gets one that has none."""
        with self._lock:
            found = {resident: self._slot(resident) for resident in residents}
            self._turn += 1
            self._asked.update((slot.number, self._turn) for slot in found.values())
        return found

    def lists(self, route: Route) -> Lists:
        """Return what the kernels read of the route."""
        found = self._lists.get(route)
        if found is None:
            with self._lock:
                slots = self.of(entry.resident for entry in route.entries)
                found = self._lists[route] = Lists(route, slots)
                self.listed.add(found)
        return found

    def table(self, device: torch.device, layer: nn.Module) -> Table:
        """Return the table that holds the layer's factors."""
        dtype = _dtype(layer)
        with self._lock:
            found = self._tables.get((device, dtype))
            if found is None:
                made = Table(device, dtype, sites=max(256, 2 * len(self.sites)))
                found = self._tables[device, dtype] = made
        return found

    @property
    def tables(self) -> list[Table]:
        return list(self._tables.values())

    def reserve(self, max_rank: int) -> None:
        """Make room in every table, before what reads it can grow no more."""
        for table in self.tables:
            table.reserve(sites=len(self.sites), max_rank=max_rank)

    def _slot(self, resident: Resident) -> Slot:
        found = self._of.get(resident)
        if found is not None:
            return found
        problem = _problem(resident)
        held: dict[Table, dict[int, tuple[Tensor, Tensor]]] = {}
        for number, own in () if resident.tokens else resident.at.items():
            table = self.table(own.bt.device, self.sites[number])
            wrong = self._problem_at(number, own, table)
            if wrong is None:
                held.setdefault(table, {})[number] = own.a, own.bt
            elif problem is None:
                problem = f"{wrong} ({self.sites.path(number)})"
        number = self._free_number() if held else -1
        if held and number < 0:
            return Slot(-1, frozenset(), 0, "finds no room beside what is in use")
        for table in self.tables if held else ():
            table.put(number, held.get(table, {}), keep=False)
            if table.device.type == "cuda":  # whichever stream reads it first
                torch.cuda.current_stream(table.device).synchronize()
        sites = frozenset(site for factors in held.values() for site in factors)
        rank = max((resident.at[site].rank for site in sites), default=0)
        slot = self._of[resident] = Slot(number, sites, rank, problem)
        return slot

    def _free_number(self) -> int:
        """Return a number nobody has, or that of the slot longest unused; -1 if none."""
        taken = {slot.number: slot for slot in self._of.values()}
        room = min(table.slots for table in self.tables)
        free = next(number for number in range(len(taken) + 1) if number not in taken)
        if free < room or not self.is_captured:
            return free
        busy = {number for lists in self.listed for number in lists.slots}
        idle = [number for number in taken if number >= 0 and number not in busy]
        if not idle:
            return -1
        oldest = min(idle, key=lambda number: self._asked.get(number, 0))
        for resident, slot in list(self._of.items()):
            if slot.number == oldest:
                del self._of[resident]
        return oldest

    def _problem_at(self, number: int, own: Factors, table: Table) -> str | None:
        """Return why these factors are no plain product that the kernels can read."""
        if own.layer != "linear":
            return f"changes a layer of another kind than a linear one: {own.layer}"
        if any(each is not None for each in (own.p, own.q, own.bias, own.bias_scale)):
            return "does more than to add a product of factors, as DoRA and biases do"
        if own.bt.dtype not in {table.dtype, torch.float32}:
            return f"has factors of {own.bt.dtype} where {table.dtype} is computed in"
        for factor in (own.a, own.bt):
            if not factor.is_contiguous() or factor.data_ptr() % ALIGNED_BYTES:
                return f"has factors that do not begin at {ALIGNED_BYTES} bytes"
            if factor.numel() >= MOST_ELEMENTS:
                return f"has factors of {factor.numel()} elements"
        if table.captured and number >= table.sites:
            return "changes a layer that was not there when the graph was captured"
        if table.captured and own.rank > table.max_rank:
            return f"has rank {own.rank}, above the {table.max_rank} there is room for"
        return None


def is_linear(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) or is_conv1d(layer)


def _problem(resident: Resident) -> str | None:
    if resident.tokens:
        return "acts from its invocation tokens on"
    if resident.replaced:
        return "replaces tensors"
    return "changes experts" if resident.experts else None


def _dtype(layer: nn.Module) -> torch.dtype:
    """Return what factors may be of beside float32."""
    dtype = getattr(getattr(layer, "weight", None), "dtype", None)
    return dtype if dtype in HALVES else torch.float32
