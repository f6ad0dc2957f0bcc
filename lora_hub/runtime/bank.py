"""`Bank`: which adapters are resident, within a budget of bytes.

    bank = Bank(sites, budget=200_000_000)
    bank.put(digest, prepared, name="style/shakespeare", reload=again)
    with bank.lease([digest]) as lease:
        lease.residents[digest]            # stays resident until the block ends

What is leased stays. Of the rest, the adapter that was asked for longest ago leaves when
another one needs its room, and comes back when it is leased: from the host's memory, where
the device has its own and `host_budget` keeps copies, else through `reload`, which reads
the package again. On the CPU, device and host are one and there are no copies.

Bytes count from before they are taken until the system has them back, which is when the
last forward or backward pass that needs them has ended; room is made first and taken
then, so the budget is never passed. A lease costs the same however many adapters there
are, unless something has to leave.

A bank may be used by many threads. None of them waits while another one reads a file,
unless it asks for the same adapter.
"""

import gc
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType, TracebackType

import torch

from lora_hub import sizes
from lora_hub.errors import InputError, NotFoundError
from lora_hub.runtime.budget import Budget, Held, Memory, Tier
from lora_hub.runtime.paging import HostCopies, brought, staged
from lora_hub.runtime.prepare import Norms, Prepared
from lora_hub.runtime.resident import Resident
from lora_hub.runtime.sites import Sites
from lora_hub.runtime.slab import Plan

# How long a lease waits for room that other threads use: a pass of one token lasts some
# milliseconds, and whoever would wait longer should be told.
PATIENCE_S = 0.05

# From the norms of a DoRA (empty for others) to the adapter prepared once more.
Reload = Callable[[Norms], Prepared]


@dataclass(slots=True, eq=False)
class _Entry:
    key: str
    name: str
    tokens: tuple[int, ...]
    reload: Reload
    from_memory: bool
    norms: Norms
    nbytes: int
    resident: Resident | None = None
    leases: int = 0
    # Set as long as somebody brings it: then another thread waits.
    coming: threading.Event | None = None
    is_dropped: bool = False
    charged: int = 0  # bytes of norms that are in the budget

    @property
    def norms_bytes(self) -> int:
        return sum(norm.nbytes for norm in self.norms.values())


@dataclass(slots=True, eq=False)
class Lease:
    """Adapters that stay resident until `release`, or until the `with` block ends.

    One that nobody has any more, as after an interrupt, is released.

    Attributes:
        residents: by key, in the order asked for; empty after `release`.
    """

    _bank: "Bank"
    _entries: list[_Entry] = field(default_factory=list)
    residents: Mapping[str, Resident] = field(default_factory=dict)

    def release(self) -> None:
        """Let them leave when room is needed; again is fine. Never waits."""
        self.residents = {}
        self._bank._release(self._entries)  # noqa: SLF001  (two halves of one thing)

    def __del__(self) -> None:
        if self._entries:
            self.release()

    def __enter__(self) -> "Lease":  # noqa: PYI034  (beartype has no `Self` of a method)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


class Bank:
    """Adapters of one model.

    Args:
        sites: numbers of the model's layers.
        budget: the most bytes that slabs may take on the devices together; None for no
            limit, and then nothing leaves.
        host_budget: the most bytes of copies in the host's memory, for a model that is not
            on the CPU; as many as `budget` by default.
    """

    def __init__(
        self, sites: Sites, *, budget: int | None = None, host_budget: int | None = None
    ) -> None:
        self.sites = sites
        self._budget = Budget(budget)
        # Without a budget nothing leaves, and there is nothing to come back.
        host = budget if host_budget is None else host_budget
        self._copies = HostCopies(0 if budget is None else host)
        self._entries: dict[str, _Entry] = {}
        # Those that are resident and may be asked to leave, asked for last, last.
        self._residents: OrderedDict[str, _Entry] = OrderedDict()
        self._lock = threading.Lock()
        # Leases may end anywhere, also where the garbage collector runs under the lock:
        # they only leave a name here.
        self._ended: deque[_Entry] = deque()
        self._norms_bytes = 0
        self._collects_at = 0.0

    @property
    def keys(self) -> tuple[str, ...]:
        """The identities of what is here."""
        return tuple(self._entries)

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def put(
        self,
        key: str,
        prepared: Prepared,
        *,
        name: str,
        tokens: tuple[int, ...] = (),
        reload: Reload | None = None,
    ) -> None:
        """Take an adapter in, and make it resident if what is leased leaves room for it.

        A key that is there already is the same adapter, and nothing happens.

        Args:
            key: its identity.
            prepared: what it does; not kept where there is a `reload`.
            name: what to call it in messages.
            tokens: invocation tokens of an aLoRA.
            reload: gives `prepared` again; without it, `prepared` is kept.

        Raises:
            InputError: it is larger than the budget, or its norms leave no room.
            ComposeError: a number is not finite in the dtype that is computed in.
        """
        if key in self._entries:
            return
        plan = Plan(prepared, self.sites)
        entry = _Entry(
            key,
            name,
            tokens,
            reload or (lambda norms: prepared),
            reload is None,
            prepared.norms,
            plan.nbytes,
        )
        event = threading.Event()
        try:
            with self._locked():
                if key in self._entries:  # another thread put it meanwhile
                    return
                if any(device.type == "cpu" for device in plan.sizes):
                    entry.charged = entry.norms_bytes
                self._check_size(entry)
                self._reserve(entry.charged, (), name)
                self._norms_bytes += entry.norms_bytes
                self._entries[key] = entry
                try:
                    self._reserve(entry.nbytes, (), name)
                except InputError:
                    return  # it comes when it is leased
                entry.coming = event
            self._bring(entry, event, plan)
        except BaseException:
            self._end(entry, event, None, entry.nbytes)
            with self._locked():
                if self._entries.get(key) is entry:  # nobody dropped it meanwhile
                    self._drop(entry)
            raise

    def lease(self, keys: Iterable[str]) -> Lease:
        """Return the adapters, all resident together, for as long as the lease is held.

        Raises:
            NotFoundError: a key is not here.
            InputError: they do not fit into the budget beside what others have leased.
            LoraHubError: what `reload` raises.
        """
        lease = Lease(self)
        try:
            with self._locked():
                entries = tuple(self._entry(key) for key in dict.fromkeys(keys))
                for entry in entries:
                    entry.leases += 1
                    lease._entries.append(entry)  # noqa: SLF001
                    if entry.key in self._residents:
                        self._residents.move_to_end(entry.key)
            until = time.monotonic() + PATIENCE_S
            while not self._came(entries, until):
                pass
        except BaseException:
            lease.release()
            raise
        lease.residents = {each.key: each.resident for each in entries if each.resident}
        return lease

    def drop(self, key: str) -> None:
        """Let an adapter go; who has leased it keeps it until the lease is released.

        Raises:
            NotFoundError: the key is not here.
        """
        with self._locked():
            self._drop(self._entry(key))

    def is_leased(self, key: str) -> bool:
        """Return whether somebody holds a lease of the adapter.

        Raises:
            NotFoundError: the key is not here.
        """
        with self._locked():
            return self._entry(key).leases > 0

    def again(self, key: str) -> Prepared:
        """Return what was put, prepared once more, with the norms of the first time.

        Raises:
            NotFoundError: the key is not here.
            LoraHubError: what `reload` raises.
        """
        with self._locked():
            entry = self._entry(key)
        return entry.reload(entry.norms)

    @property
    def used_bytes(self) -> int:
        """Bytes that slabs take now, on the CPU with DoRA's norms."""
        with self._locked():
            return self._budget.used_bytes

    @property
    def memory(self) -> Memory:
        """What everything takes, and where it is."""
        with self._locked():
            held = {
                key: Held(each.name, each.nbytes, self._tier(each), each.leases)
                for key, each in self._entries.items()
            }
            return Memory(
                self._budget.limit,
                self._budget.used_bytes,
                self._norms_bytes,
                self._copies.budget,
                self._copies.used_bytes,
                MappingProxyType(held),
            )

    def _tier(self, entry: _Entry) -> Tier:
        if entry.resident is not None:
            return "device"
        if entry.key in self._copies:
            return "host"
        return "memory" if entry.from_memory else "disk"

    def _entry(self, key: str) -> _Entry:
        found = self._entries.get(key)
        if found is None:
            raise NotFoundError("no adapter of this identity is in the bank", where=key)
        return found

    def _release(self, entries: list[_Entry]) -> None:
        while entries:
            try:
                self._ended.append(entries.pop())
            except IndexError:  # another thread released the rest
                return

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Lock, with all accounts settled."""
        with self._lock:
            self._settle()
            yield

    def _came(self, entries: Collection[_Entry], until: float) -> bool:
        """Bring what is missing; return whether all are there, else ask again.

        Until then (in monotonic seconds) it is waited for room that others use.
        """
        mine: list[tuple[_Entry, threading.Event]] = []
        try:
            with self._locked():
                missing = [each for each in entries if each.resident is None]
                if not missing:
                    return True
                others = [each.coming for each in missing if each.coming is not None]
                own = [each for each in missing if each.coming is None]
                # For all together, so that no two leases wait for room that the other took.
                names = ", ".join(each.name for each in own)
                nbytes = sum(each.nbytes for each in own)
                is_to_wait = time.monotonic() < until and self._is_full_for_now(nbytes)
                if not is_to_wait:
                    self._reserve(nbytes, entries, names)
                    for entry in own:
                        entry.coming = threading.Event()
                        mine.append((entry, entry.coming))
            for entry, event in mine:
                self._bring(entry, event)
        except BaseException:
            for entry, event in mine:
                self._end(entry, event, None, entry.nbytes)
            raise
        for event in others:
            event.wait()
        if is_to_wait:
            time.sleep(0.0005)
        return False  # another thread may have failed at one of them

    def _bring(
        self, entry: _Entry, event: threading.Event, plan: Plan | None = None
    ) -> None:
        """Make an adapter resident for whose bytes there is room, and say so."""
        reserved = entry.nbytes  # of these, what is not allocated yet
        resident = None

        def allocate(size_bytes: int, device: torch.device) -> torch.Tensor:
            nonlocal reserved
            slab = self._budget.allocate(size_bytes, device)
            reserved -= size_bytes
            return slab

        try:
            with self._locked():
                copy = self._copies.get(entry.key)
            if copy is None:
                plan = plan or Plan(entry.reload(entry.norms), self.sites)
                if plan.nbytes != entry.nbytes:
                    self._other_size(entry, plan.nbytes)
                    reserved = plan.nbytes
                if all(device.type == "cpu" for device in plan.sizes):
                    resident = plan.filled(entry.name, entry.key, entry.tokens, allocate)
                else:
                    copy = staged(plan, entry.name, entry.key, entry.tokens)
            if copy is not None:
                resident = brought(copy, allocate)
                with self._locked():
                    self._copies.keep(entry.key, copy)
        finally:
            self._end(entry, event, resident, reserved)

    def _end(
        self,
        entry: _Entry,
        event: threading.Event,
        resident: Resident | None,
        unused: int,
    ) -> None:
        """Tell those who wait that an adapter came, or did not; again does nothing."""
        try:
            with self._locked():
                if entry.coming is not event:
                    return
                entry.coming = None
                self._budget.give_back(unused)
                entry.resident = resident
                if resident is not None and not entry.is_dropped:
                    self._residents[entry.key] = entry
                if entry.is_dropped:
                    self._copies.drop(entry.key)
                    if not entry.leases:
                        self._leave(entry)
        finally:
            # Also where an interrupt came in between, or others would wait forever.
            if entry.coming is not event:
                event.set()

    def _other_size(self, entry: _Entry, nbytes: int) -> None:
        """Make room where an adapter takes other bytes than before.

        As after the model was moved or brought to another dtype.
        """
        with self._locked():
            before, entry.nbytes = entry.nbytes, nbytes
            if nbytes > before:
                try:
                    self._reserve(nbytes - before, (entry,), entry.name)
                except InputError:
                    entry.nbytes = before
                    raise
            else:
                self._budget.give_back(before - nbytes)

    # What follows is called under the lock.

    def _settle(self) -> None:
        while self._ended:
            entry = self._ended.popleft()
            entry.leases -= 1
            if entry.is_dropped and not entry.leases:
                self._leave(entry)

    def _drop(self, entry: _Entry) -> None:
        # In an order in which it can be begun again after an interrupt.
        if not entry.leases:
            self._leave(entry)
        self._residents.pop(entry.key, None)
        self._copies.drop(entry.key)
        charged, entry.charged = entry.charged, 0
        self._budget.give_back(charged)
        entry.is_dropped = True
        self._norms_bytes -= entry.norms_bytes
        del self._entries[entry.key]

    def _check_size(self, entry: _Entry) -> None:
        nbytes = entry.nbytes + entry.charged
        limit = self._budget.limit
        if limit is not None and nbytes > limit:
            raise InputError(
                f"the adapter takes {sizes.to_text(nbytes)}, the budget is "
                f"{sizes.to_text(limit)}",
                where=entry.name,
                hint="attach with a larger budget",
            )

    def _reserve(self, nbytes: int, kept: Collection[_Entry], names: str) -> None:
        """Take bytes of the budget; let others leave for them, but for those in `kept`.

        Raises:
            InputError: what is leased or needed by a running pass leaves no room.
        """
        budget = self._budget
        self._make_room(nbytes, kept)
        if not budget.has_room(nbytes):
            self._collect()  # what hangs in a cycle is nobody's
            self._settle()
            self._make_room(nbytes, kept)
        if not budget.has_room(nbytes):
            raise self._no_room(nbytes, names)
        budget.take(nbytes)

    def _collect(self) -> None:
        began = time.monotonic()
        if began < self._collects_at:
            gc.collect(1)
            return
        gc.collect()
        # With a model in memory that may take a second: not more than a tenth of the time.
        ended = time.monotonic()
        self._collects_at = ended + 9 * (ended - began)

    def _make_room(self, nbytes: int, kept: Collection[_Entry]) -> None:
        budget = self._budget
        if budget.has_room(nbytes):
            return
        may_leave = [
            each
            for each in self._residents.values()
            if not each.leases and each not in kept
        ]
        freed = sum(each.nbytes for each in may_leave)
        if budget.has_room(nbytes - freed):  # or all would leave for nothing
            for entry in may_leave:
                if budget.has_room(nbytes):
                    break
                self._leave(entry)

    def _leave(self, entry: _Entry) -> None:
        resident, entry.resident = entry.resident, None
        if resident is None:
            return
        if self._residents.get(entry.key) is entry:
            del self._residents[entry.key]
        for device in resident.devices:
            if device.type == "cuda":  # a stream may not have come to what was asked of it
                torch.cuda.synchronize(device)

    def _is_full_for_now(self, nbytes: int) -> bool:
        """Whether there is no room, and might be once others have let go what they use."""
        limit = self._budget.limit
        if limit is None or self._budget.has_room(nbytes):
            return False
        _, idle, norms = self._kinds()
        return nbytes <= limit - norms and not self._budget.has_room(nbytes - idle)

    def _kinds(self) -> tuple[int, int, int]:
        """Return the bytes of what is leased, of what may leave, and of norms."""
        held = self._residents.values()
        leased = sum(each.nbytes for each in held if each.leases)
        norms = sum(each.charged for each in self._entries.values())
        return leased, sum(each.nbytes for each in held) - leased, norms

    def _no_room(self, nbytes: int, names: str) -> InputError:
        limit = self._budget.limit or 0
        resident, idle, norms = self._kinds()
        rest = self._budget.used_bytes - resident - idle - norms
        parts = [
            f"{sizes.to_text(size)} {what}"
            for size, what in (
                (resident, "are in use"),
                (norms, "are norms of DoRA"),
                (rest, "are needed by what still runs"),
            )
            if size
        ]
        return InputError(
            f"{sizes.to_text(nbytes)} are needed, and of the budget of "
            f"{sizes.to_text(limit)} " + (", ".join(parts) or "nothing is left"),
            where=names,
            hint="use fewer adapters at once, or attach with a larger budget",
        )
