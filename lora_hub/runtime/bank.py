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
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping
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

    Attributes:
        residents: by key, in the order asked for; empty after `release`.
    """

    _bank: "Bank"
    _entries: tuple[_Entry, ...]
    residents: Mapping[str, Resident] = field(default_factory=dict)

    def release(self) -> None:
        """Let them leave when room is needed; again is fine."""
        entries, self._entries = self._entries, ()
        self.residents = {}
        self._bank._release(entries)  # noqa: SLF001  (two halves of one thing)

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
        self._norms_bytes = 0

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
        with self._lock:
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
            entry.coming = threading.Event()
        try:
            self._bring(entry, plan)
        except BaseException:
            if key in self:  # nobody dropped it meanwhile
                self.drop(key)
            raise

    def lease(self, keys: Iterable[str]) -> Lease:
        """Return the adapters, all resident together, for as long as the lease is held.

        Raises:
            NotFoundError: a key is not here.
            InputError: they do not fit into the budget beside what others have leased.
            LoraHubError: what `reload` raises.
        """
        with self._lock:
            entries = tuple(self._entry(key) for key in dict.fromkeys(keys))
            for entry in entries:
                entry.leases += 1
                if entry.key in self._residents:
                    self._residents.move_to_end(entry.key)
        try:
            while not self._came(entries):
                pass
        except BaseException:
            self._release(entries)
            raise
        residents = {each.key: each.resident for each in entries if each.resident}
        return Lease(self, entries, residents)

    def drop(self, key: str) -> None:
        """Let an adapter go; who has leased it keeps it until the lease is released.

        Raises:
            NotFoundError: the key is not here.
        """
        with self._lock:
            entry = self._entry(key)
            del self._entries[key]
            entry.is_dropped = True
            self._copies.drop(key)
            self._norms_bytes -= entry.norms_bytes
            self._budget.give_back(entry.charged)
            self._residents.pop(key, None)
            if not entry.leases:
                self._leave(entry)

    def is_leased(self, key: str) -> bool:
        """Return whether somebody holds a lease of the adapter.

        Raises:
            NotFoundError: the key is not here.
        """
        with self._lock:
            return self._entry(key).leases > 0

    def again(self, key: str) -> Prepared:
        """Return what was put, prepared once more, with the norms of the first time.

        Raises:
            NotFoundError: the key is not here.
            LoraHubError: what `reload` raises.
        """
        with self._lock:
            entry = self._entry(key)
        return entry.reload(entry.norms)

    @property
    def used_bytes(self) -> int:
        """Bytes that slabs take now, on the CPU with DoRA's norms."""
        with self._lock:
            return self._budget.used_bytes

    @property
    def memory(self) -> Memory:
        """What everything takes, and where it is."""
        with self._lock:
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

    def _release(self, entries: Collection[_Entry]) -> None:
        with self._lock:
            for entry in entries:
                entry.leases -= 1
                if entry.is_dropped and not entry.leases:
                    self._leave(entry)

    def _came(self, entries: Collection[_Entry]) -> bool:
        """Bring what is missing; return whether all are there, else ask again."""
        with self._lock:
            missing = [each for each in entries if each.resident is None]
            if not missing:
                return True
            others = [each.coming for each in missing if each.coming is not None]
            mine = [each for each in missing if each.coming is None]
            # For all together, so that no two leases wait for room that the other took.
            names = ", ".join(each.name for each in mine)
            self._reserve(sum(each.nbytes for each in mine), entries, names)
            for entry in mine:
                entry.coming = threading.Event()
        while mine:
            try:
                self._bring(mine[0])
            except BaseException:
                for entry in mine[1:]:
                    self._end(entry, None, entry.nbytes)
                raise
            del mine[0]
        for event in others:
            event.wait()
        return False  # another thread may have failed at one of them

    def _bring(self, entry: _Entry, plan: Plan | None = None) -> None:
        """Make an adapter resident for whose bytes there is room, and say so."""
        reserved = entry.nbytes  # of these, what is not allocated yet
        resident = None

        def allocate(size_bytes: int, device: torch.device) -> torch.Tensor:
            nonlocal reserved
            slab = self._budget.allocate(size_bytes, device)
            reserved -= size_bytes
            return slab

        try:
            with self._lock:
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
                with self._lock:
                    self._copies.keep(entry.key, copy)
        finally:
            self._end(entry, resident, reserved)

    def _end(self, entry: _Entry, resident: Resident | None, unused: int) -> None:
        """Tell those who wait that an adapter came, or did not."""
        with self._lock:
            self._budget.give_back(unused)
            entry.resident = resident
            if resident is not None and not entry.is_dropped:
                self._residents[entry.key] = entry
            event, entry.coming = entry.coming, None
            if entry.is_dropped:
                self._copies.drop(entry.key)
                if not entry.leases:
                    self._leave(entry)
        if event is not None:
            event.set()

    def _other_size(self, entry: _Entry, nbytes: int) -> None:
        """Make room where an adapter takes other bytes than before.

        As after the model was moved or brought to another dtype.
        """
        with self._lock:
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
        if not budget.has_room(nbytes):
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
            if not budget.has_room(nbytes):
                gc.collect()  # what hangs in a cycle is nobody's
            if not budget.has_room(nbytes):
                raise self._no_room(nbytes, names)
        budget.take(nbytes)

    def _leave(self, entry: _Entry) -> None:
        resident, entry.resident = entry.resident, None
        if resident is None:
            return
        if self._residents.get(entry.key) is entry:
            del self._residents[entry.key]
        devices = {each.bt.device for each in resident.at.values()}
        devices |= {each.bt.device for each in resident.experts.values()}
        devices |= {each.tensor.device for each in resident.replaced.values()}
        for device in devices:
            if device.type == "cuda":  # a stream may not have come to what was asked of it
                torch.cuda.synchronize(device)

    def _no_room(self, nbytes: int, names: str) -> InputError:
        limit = self._budget.limit or 0
        resident = sum(each.nbytes for each in self._residents.values() if each.leases)
        norms = sum(each.charged for each in self._entries.values())
        rest = self._budget.used_bytes - resident - norms
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
