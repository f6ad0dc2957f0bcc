"""`Route`: which rows of a batch use which adapters, with what weight.

A route is made once and read by every layer of a forward. It tells the same thing twice,
because two kinds of layers ask in two ways: by adapter (`entries`: this adapter, on these
rows, with these weights), for layers to whose output is added; and by set (`segments`:
these rows, this set), for modules that run with another parameter, and so once a set.

An entry of `rows` stands for `each` consecutive rows of the batch, and a layer that sees
rows and tokens in one axis sees each row's tokens side by side.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from lora_hub.errors import InputError
from lora_hub.runtime.resident import Factors, Resident

# What acts together on a row: adapters with their weights, none of which is zero.
Set = tuple[tuple[Resident, float], ...]


class Rows:
    """Some rows of a batch of `total`, as what indexes the first axis of a tensor."""

    __slots__ = ("_cached", "_rows", "total")

    def __init__(self, rows: Sequence[int], total: int) -> None:
        self._rows = tuple(rows)
        self.total = total
        self._cached: dict[tuple[int, torch.device], slice | Tensor] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[int]:
        return iter(self._rows)

    def of(self, length: int, device: torch.device) -> slice | Tensor:
        """Return these rows in an axis of `length`, a multiple of `total`.

        A slice where they lie side by side, else their numbers on the device.
        """
        key = length, device
        found = self._cached.get(key)
        if found is None:
            # Kept for other forwards, some of which may want gradients.
            with torch.inference_mode(False):
                found = self._of(length // self.total, device)
            self._cached[key] = found
        return found

    def _of(self, times: int, device: torch.device) -> slice | Tensor:
        first, last = self._rows[0], self._rows[-1]
        if self._rows == tuple(range(first, last + 1)):
            return slice(first * times, (last + 1) * times)
        starts = torch.tensor(self._rows, device=device)[:, None] * times
        return (starts + torch.arange(times, device=device)).reshape(-1)


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """One adapter on some rows.

    Attributes:
        rows: None for all.
        weight: of all its rows, where they agree.
        weights: (rows,) else, one for each of `rows`, float64 on the CPU.
    """

    resident: Resident
    rows: Rows | None
    weight: float
    weights: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """Some rows that use one set; `rows` is None for all, `set` empty for the base."""

    rows: Rows | None
    set: Set

    @property
    def numbers(self) -> tuple[int, ...] | None:
        return None if self.rows is None else tuple(self.rows)


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Route:
    """What acts where. The empty route is the base alone.

    Attributes:
        total: how many rows a batch has; None where every batch is as good.
        adds_only: whether no set does more than to add to outputs.
        is_alone: whether at most one adapter acts on each row.
        dropped: a set → site → which of p, q, bias_scale is not added to the layer's
            output, since it goes into a tensor that the set replaces there.
        number: of its own, for `route_of`.
        effects: number of a site → what this route does there, kept from the first forward
            on (`effect.py`).
        groups: a module's stand-in → what it runs for this route, kept likewise
            (`stand_in.py`).
    """

    entries: tuple[Entry, ...] = ()
    segments: tuple[Segment, ...] = ()
    total: int | None = None
    dropped: dict[Set, Mapping[int, frozenset[str]]] = field(default_factory=dict)
    adds_only: bool = field(init=False)
    is_alone: bool = field(init=False)
    number: int = field(init=False, default_factory=itertools.count().__next__)
    effects: dict[int, Any] = field(init=False, default_factory=dict)
    groups: dict[Any, Any] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        only = all(entry.resident.adds_only for entry in self.entries)
        object.__setattr__(self, "adds_only", only)
        is_alone = all(len(segment.set) < 2 for segment in self.segments)
        object.__setattr__(self, "is_alone", is_alone)
        _ROUTES[self.number] = self

    @property
    def sites(self) -> set[int]:
        """The layers it adds to."""
        return set().union(*(entry.resident.at for entry in self.entries))

    def at(self, number: int) -> Iterator[tuple[Entry, Factors]]:
        """Give what is added to the layer's output: by adapter, or by set and adapter."""
        if self.adds_only:
            for entry in self.entries:
                own = entry.resident.at.get(number)
                if own is not None:
                    yield entry, own
            return
        for segment in self.segments:
            dropped = self.dropped.get(segment.set, {}).get(number, frozenset())
            for resident, weight in segment.set:
                own = resident.at.get(number)
                if own is not None:
                    none: dict[str, Any] = dict.fromkeys(dropped)
                    left = replace(own, **none) if dropped else own
                    yield Entry(resident, segment.rows, weight), left

    def is_same(self, other: "Route") -> bool:
        """Return whether both let the same adapters act on the same rows."""
        return self is other or (
            self.total == other.total
            and [(each.set, each.numbers) for each in self.segments]
            == [(each.set, each.numbers) for each in other.segments]
        )


_ROUTES: WeakValueDictionary[int, Route] = WeakValueDictionary()
BARE = Route()


def route_of(number: int) -> Route | None:
    """Return the route of this number, None where nobody has it any more."""
    return _ROUTES.get(number)


def for_all(acting: Set) -> Route:
    """Return the route on which every row uses one set."""
    if not acting:
        return BARE
    entries = tuple(Entry(resident, None, weight) for resident, weight in acting)
    return Route(entries, (Segment(None, acting),))


def by_rows(sets: Sequence[Set], each: int = 1) -> Route:
    """Return the route of a batch: one set a row, or for `each` consecutive rows.

    Raises:
        InputError: there is no row, or `each` is no positive number.
    """
    if not sets or each < 1:
        raise InputError(
            f"{len(sets)} entries, each for {each} rows: expected at least one of both"
        )
    spread = [one for one in sets for _ in range(each)]
    total = len(spread)
    by_set: dict[Set, list[int]] = {}
    by_resident: dict[Resident, dict[int, float]] = {}
    for row, one in enumerate(spread):
        by_set.setdefault(one, []).append(row)
        for resident, weight in one:
            own = by_resident.setdefault(resident, {})
            own[row] = own.get(row, 0.0) + weight
    return Route(
        tuple(_entry(resident, own, total) for resident, own in by_resident.items()),
        tuple(Segment(Rows(rows, total), one) for one, rows in by_set.items()),
        total,
    )


def _entry(resident: Resident, own: dict[int, float], total: int) -> Entry:
    weights = list(own.values())
    rows = Rows(tuple(own), total)
    if len(set(weights)) == 1:
        return Entry(resident, rows, weights[0])
    return Entry(resident, rows, 1.0, torch.tensor(weights, dtype=torch.float64))
