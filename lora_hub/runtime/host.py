"""`Host`: adapters on a running model, without changing it.

    host = Host(model, find)
    host.load("style/shakespeare")         # found, checked against the model, on its device
    host.use({"style/shakespeare": 0.7})   # acts from the next call of the model on
    host.detach()                          # the model is the object it was

Parameters are never written to, but by `merge`: the effect of what is used rides on forward
hooks (`hooks.py`). Most add to what a layer gives (`effect.py`); what replaces a tensor,
and what changes experts, runs on twins of modules (`twins.py`). How adapters come is told
by `loading.py`, and where they stay by `bank.py`.

`use` is for every thread; `using` and `rows` act in the thread or the asyncio task that
opens the block (`blocks.py`), where the innermost wins. A forward keeps what acted when it
began. One host is for one model, and where another one acts it is refused (`rivals.py`); a
deep copy of the model follows the same host.
"""

import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType

import torch
from torch import nn

from lora_hub.adapter.adapter import Adapter
from lora_hub.errors import ComposeError, FitError, InputError, NotFoundError
from lora_hub.manifest.document import Policy
from lora_hub.runtime.bank import Bank, Lease
from lora_hub.runtime.budget import Memory
from lora_hub.runtime.changed import Acting
from lora_hub.runtime.graphs import Graphs
from lora_hub.runtime.hooks import Hooks
from lora_hub.runtime.in_force import InForce, Used, Weights, What, weights_of
from lora_hub.runtime.in_place import InPlace
from lora_hub.runtime.layers import ALL_LINEAR, reserved_layers
from lora_hub.runtime.loading import Find, Loaded, Loader
from lora_hub.runtime.merged import Keep, Merged, merge
from lora_hub.runtime.product import Kernels, Products
from lora_hub.runtime.report import LoadReport
from lora_hub.runtime.resident import Resident
from lora_hub.runtime.rivals import Rivals
from lora_hub.runtime.route import BARE, Route, Set, by_rows, for_all
from lora_hub.runtime.sites import Sites
from lora_hub.runtime.slab import reside
from lora_hub.runtime.survived import MergedReport
from lora_hub.runtime.twins import Twins

Sets = tuple[dict[str, float], ...]


class Host:
    """Adapters on one model.

    Args:
        model: any `torch.nn.Module`; targets are paths of its modules.
        find: turns a reference or a folder into an adapter whose bytes are verified.
            Without it only adapters in memory can be loaded.
        budget: the most bytes that adapters may take beside the model, None for no limit.
        host_budget: the most bytes of copies in the host's memory, for a model that is
            not on the CPU; as many as `budget` by default.
        reserve: layers that get their hook at once and keep it, so that a model compiled
            afterwards is not compiled again whatever is used: "all-linear", or names of
            layers or the ends of their paths.
        kernels: what computes products of factors on a GPU: "torch"; "triton", the
            grouped kernels, for all that they can; "auto", those for rows with adapters of
            their own, where they run. See `product.py`.
    """

    def __init__(
        self,
        model: nn.Module,
        find: Find | None = None,
        *,
        budget: int | None = None,
        host_budget: int | None = None,
        reserve: str | Sequence[str] = (),
        kernels: Kernels = "auto",
    ) -> None:
        self._model: nn.Module | None = model
        self._loaded: dict[str, Loaded] = {}
        self._by_key: dict[str, dict[str, Loaded]] = {}  # key of the bank → name → loaded
        self._in_force = InForce()
        self._merged: tuple[Merged, Used] | None = None
        self._lock = threading.RLock()
        self._changes = 0  # of names, that are going on
        self._is_untidy = False
        self._sites = Sites(model)
        self._bank = Bank(self._sites, budget=budget, host_budget=host_budget)
        self._loader = Loader(model, find, self._bank)
        self._in_place = InPlace(model)
        products = Products.of(model, self._sites, kernels)
        self._graphs = None if products is None else Graphs(products, self._sites)
        self._hooks = Hooks(model, self._sites, lambda: self._in_force.now.route, products)
        self._twins = Twins(model, self._sites, self._hooks.step)
        self._rivals = Rivals(self, model)
        self._rivals.check()
        reserved = reserved_layers(model, reserve)
        self._is_reserved = bool(reserved)
        if reserved:
            self._hooks.put_on([self._sites.number(layer) for layer in reserved])
            _forget_compiled()

    def __repr__(self) -> str:
        if self._model is None:
            return "Host(detached)"
        loaded = ", ".join(self._loaded) or "none"
        try:
            weights = self.used
        except InputError:  # a generator stands still, and it is not known
            used = "?"
        else:
            used = ", ".join(f"{name}={weight:g}" for name, weight in weights.items())
        model = type(self._model).__name__
        merged = ", merged" if self._merged else ""
        return f"Host({model}, loaded: {loaded}, used: {used or 'none'}{merged})"

    @property
    def adapters(self) -> Mapping[str, LoadReport]:
        """The loaded adapters by name, each with the report of its loading."""
        return MappingProxyType({name: each.report for name, each in self._loaded.items()})

    @property
    def used(self) -> Weights:
        """Name → weight of what acts now in this thread; empty where the base acts alone.

        Inside of `rows` the weight is NaN where it is not the same on all of its rows.
        """
        return MappingProxyType(self._in_force.now.weights)

    @property
    def memory(self) -> Memory:
        """What the loaded adapters take, and where they are; `str` of it is a sentence."""
        return self._bank.memory

    @property
    def acts(self) -> bool:
        """Whether the model is changed by this host, for any thread."""
        used = self._in_force.everything
        return self._merged is not None or any(each.route.entries for each in used)

    def load(
        self,
        what: str | Path | Adapter,
        *,
        as_: str | None = None,
        policy: Policy | None = None,
    ) -> LoadReport:
        """Bring an adapter to the model's device, ready to be used, and say how it fits.

        Nothing acts before `use`. All targets are found in the model, or the adapter is
        refused. Loading the same adapter under the same name again checks it again and
        changes nothing. The same package under two names takes memory once.

        Args:
            what: a reference, a folder, or an adapter in memory.
            as_: the name to know it by; its own by default.
            policy: how strictly the base is compared; as the manifest says by default.

        Raises:
            FitError: the adapter was made for another base, or a target is not there.
            InconclusiveError: the base is to be compared and the adapter does not name it.
            InputError: it has no name and none is given, the name is taken by another
                adapter, it is larger than the budget, or adapters are merged.
            ComposeError: it has numbers that are not finite.
            LoraHubError: `find` did not find it or does not trust it.
        """
        self._unmerged()
        given = self._loader.found(what, as_)
        name = given.name
        with self._lock:
            known = self._loaded.get(name)
            if known is not None and not known.is_same(given.adapter):
                raise InputError(
                    "another adapter is loaded under this name",
                    where=name,
                    hint=f"host.unload({name!r}) first, or give this one a name with "
                    f"as_=...; host.swap({name!r}, ...) puts it in the other's place",
                )
        with self._tidy():
            self._unmerged()  # nothing is merged from here on: weights are read
            made = self._loader.loaded(
                given, policy, self._loaded_already(given.adapter, known)
            )
            self._take_in(name, made, known)
        return made.report

    def swap(
        self,
        name: str,
        what: str | Path | Adapter,
        *,
        expected: str | None = None,
        policy: Policy | None = None,
    ) -> LoadReport:
        """Put another adapter in the place of a loaded one, under its name.

        The new one is made ready first and then takes the name in one step: wherever the
        name is used, it acts from the next call of the model on, whatever its ranks and
        targets. Calls that run keep the old one until they end. If anything fails,
        everything is as it was. For a moment both are resident.

        Args:
            name: of the adapter to be replaced.
            what: a reference, a folder, or an adapter in memory.
            expected: digest the adapter in place must have.
            policy: how strictly the base is compared; as the manifest says by default.

        Raises:
            NotFoundError: the name is not loaded.
            InputError: the adapter in place is not the one expected, or was exchanged by
                another thread meanwhile; or adapters are merged.
            ComposeError: a weight in use makes a number the dtype cannot hold.
            LoraHubError: as `load`.
        """
        self._unmerged()
        old = self._get(name)
        if expected is not None and old.report.digest != expected:
            raise InputError(
                f"the adapter in place is {old.report.digest or 'one without a digest'}, "
                f"expected {expected}",
                where=name,
                hint="another swap came first; look at host.adapters and decide again",
            )
        given = self._loader.found(what, name)
        with self._tidy():
            self._unmerged()
            made = self._loader.loaded(given, policy, self._loaded_already(given.adapter))
            self._take_in(name, made, old)
        return made.report

    def use(self, what: What) -> None:
        """Let these adapters act from the next call of the model on, and no others.

        In every thread, but where a `using` or `rows` block is open.

        Args:
            what: a name (weight 1.0), names with their weights, or None for the base alone.
                Weights are finite; the deltas add up, each times its weight.

        Raises:
            NotFoundError: a name is not loaded; what was used before stays used.
            InputError: a weight is no finite number, or makes one that the dtype which is
                computed in cannot hold; the adapters do not fit into the budget together;
                adapters are merged; or a block is open in this thread, in which this
                would do nothing.
            FitError: a layer of the model was replaced since the adapter was loaded.
        """
        if self._in_force.blocks.now is not None:
            raise InputError(
                "a block of `using` or `rows` is open in this thread, and what it asks for "
                "acts until it ends",
                hint="leave the block first, or open another one inside of it",
            )
        self._put_in_force((weights_of(what),), None, self._use)

    @contextmanager
    def using(self, what: What) -> Iterator[None]:
        """Use these adapters inside a `with` block, then what was before.

        In this thread or asyncio task. A block that a generator opens acts while the
        generator runs; a call of the model beside one that stands still in its block is
        refused.

        Hooks that the block needed stay on the model, for the next one, and do nothing;
        `use(None)` takes them off.

        Raises:
            NotFoundError, InputError, FitError: as `use`.
        """
        with self._block((weights_of(what),), None):
            yield

    @contextmanager
    def rows(self, entries: Sequence[What], each: int = 1) -> Iterator[None]:
        """Let each row of a batch use adapters of its own inside a `with` block.

        The model is then called with as many rows, in the same order. Rows without an
        adapter are the base's, bit for bit, but that a module of which an adapter replaces
        a tensor multiplies them apart from the others, which may round otherwise.

        Args:
            entries: for each row what `use` takes: a name, names with weights, or None.
            each: how many consecutive rows of the batch one entry stands for: `num_beams`
                or `num_return_sequences` of `generate`.

        Raises:
            NotFoundError, InputError, FitError: as `use`. A forward inside the block
                raises InputError where it is given other rows.
        """
        if isinstance(entries, str | Mapping) or not isinstance(entries, Sequence):
            raise InputError(
                f"the rows are given as a {type(entries).__name__}, expected a list with "
                "one entry a row",
                hint="host.using(...) is for all rows",
            )
        with self._block(tuple(weights_of(what) for what in entries), each):
            yield

    @contextmanager
    def capturing(
        self,
        *,
        reserve: str | Sequence[str] = ALL_LINEAR,
        per_row: int = 4,
        max_rank: int = 64,
    ) -> Iterator[None]:
        """Let what acts now act in a way that a CUDA graph captured inside can replay.

        Whatever is used or swapped in afterwards, the graph does when it is replayed next:
        see `graphs.py`. Call the model once inside of the block before it is captured.
        Open `rows` or `using` outside of it.

        Args:
            reserve: layers that later adapters may change, as for `Host`.
            per_row: how many adapters may act on one row.
            max_rank: of which rank an adapter may be.

        Raises:
            InputError: the kernels do not run here, cannot do what acts now, or graphs
                were captured before with less room. From then on, `use`, `rows` and `swap`
                raise it for what the graphs cannot do.
        """
        model, graphs = self._unmerged(), self._graphs
        if graphs is None:
            raise InputError(
                "no kernels that a captured graph could replay run on this model",
                hint="they need Triton and an NVIDIA GPU since Ampere, and a host that is "
                "not attached with kernels='torch'",
            )
        now = self._in_force.now
        block = self._in_force.blocks.new(Used())

        def begin(used: Used) -> None:
            layers = reserved_layers(model, reserve)
            numbers = [self._sites.number(layer) for layer in layers]
            route = graphs.begin(used.route, numbers, per_row=per_row, max_rank=max_rank)
            if self._hooks.put_on(numbers):
                _forget_compiled()
            used.route = route
            block.what = used
            self._in_force.blocks.begin(block)
            self._flip()

        try:
            self._put_in_force(now.sets, now.each, begin)
            yield
        finally:
            try:
                self._in_force.end(block)
            finally:  # once more, where an interrupt came in between
                self._in_force.end(block)
                self._flip()

    def merge(
        self,
        what: What = None,
        *,
        keep: Keep = "memory",
        untie: bool = False,
        verify: bool = False,
        measure: bool = True,
    ) -> MergedReport:
        """Write adapters into the model's weights, so that they cost nothing to use.

        Until `unmerge`, what acts is fixed and nothing can be loaded or swapped. What has
        no place in weights, such as a bias of a layer that has none, acts on outputs.

        Args:
            what: as in `use`; by default what is used now.
            keep: "memory" or the folder of the checkpoint, see `merged.py`.
            untie: see `merged.py`.
            verify: see `merged.py`.
            measure: whether to find out what the rounding left of each change, which takes
                about as long as merging.

        Raises:
            InputError: adapters are merged already, nothing is used, a forward runs, a
                block is open, or another thread loads an adapter.
            LoraHubError: see `merged.py`; the weights then have the bits they had.
        """
        with self._lock:
            model = self._unmerged()
            sets = self._in_force.all.sets if what is None else (weights_of(what),)
            weights = sets[0] if sets else {}
            if not any(weights.values()):
                raise InputError(
                    "nothing is used that could be merged", hint="host.use(...)"
                )
            if self._in_force.is_any_open:
                raise InputError(
                    "a block of `using` or `rows` is open",
                    hint="merge after all blocks have ended",
                )
            if self._changes:
                raise InputError(
                    "another thread loads or swaps an adapter, which reads the weights",
                    hint="merge once it has ended",
                )
            self._rivals.check()
            acting = [self._acting(name, w) for name, w in weights.items() if w]
            try:
                with self._hooks.nothing_runs():
                    merged = None
                    try:
                        merged = merge(
                            model,
                            acting,
                            keep=keep,
                            untie=untie,
                            verify=verify,
                            measure=measure,
                        )
                        new, old = self._left(merged.left, weights), self._in_force.all
                        self._merged, self._in_force.all = (merged, old), new
                        self._flip()
                    except BaseException:
                        self._merged = None
                        if merged is not None:
                            merged.unmerge()
                        raise
            finally:
                self._let_go()
        return merged.report

    def unmerge(self, *, overwrite: bool = False) -> None:
        """Give every weight the bits it had before `merge`; what was used acts again.

        Where nothing is merged, nothing happens.

        Raises:
            InputError, IntegrityError: see `merged.py`; nothing is written.
        """
        self._attached()
        with self._lock:
            if self._merged is None:
                return
            merged, old = self._merged
            self._put_on(old.route)  # first: it may be refused
            try:
                with self._hooks.nothing_runs():
                    try:
                        merged.unmerge(overwrite=overwrite)
                    finally:  # an interrupt is told once everything is put back
                        try:
                            self._restored(merged, old)
                        finally:  # once more, where another one came in between
                            self._restored(merged, old)
            finally:
                self._let_go()

    def _restored(self, merged: Merged, old: Used) -> None:
        if not merged.is_merged:
            self._merged, self._in_force.all = None, old
            self._flip()

    def unload(self, name: str) -> None:
        """Let an adapter go.

        Raises:
            NotFoundError: the name is not loaded.
            InputError: the adapter is used now, by whatever thread, or will be used again
                when a block ends or when merged weights are restored.
        """
        self._attached()
        with self._tidy(), self._lock:
            loaded = self._get(name)
            held = (*self._in_force.everything, *(self._merged or ())[1:])
            if any(name in used.names for used in held if isinstance(used, Used)):
                raise InputError(
                    "the adapter is in use and cannot be unloaded",
                    where=name,
                    hint="host.use(None) first, outside of `with host.using(...)`",
                )
            self._name(name, None)
            self._drop(loaded.key)

    def detach(self) -> None:
        """Take the host off: no hook is left and the model is the object it was.

        What is merged is unmerged first. The host lets all adapters go and cannot be used
        again. Detaching twice is fine.
        """
        if self._model is None:
            return
        self.unmerge()
        with self._lock:
            if self._graphs is not None:
                self._graphs.let_go()
                self._graphs = None
            for each in self._in_force.everything:
                each.sets, each.route = (), BARE
                each.release()
            self._hooks.when_idle(partial(_take_off, self._hooks, self._twins))
            self._rivals.leave()
            self._loaded.clear()
            self._by_key.clear()
            # Whoever still has the host does not keep the model with it.
            self._model, self._bank = None, Bank(Sites())
            del self._sites, self._loader, self._in_place, self._hooks, self._twins

    @contextmanager
    def _block(self, sets: Sets, each: int | None) -> Iterator[None]:
        # What is asked for is there before it is known how, so that whatever is
        # interrupted, all of it ends. That waits for nobody: it may be the garbage
        # collector that ends a generator, wherever it runs.
        block = self._in_force.blocks.new(Used())

        def begin(used: Used) -> None:
            block.what = used
            self._in_force.blocks.begin(block)
            self._flip()

        try:
            self._put_in_force(sets, each, begin)
            yield
        finally:
            try:
                self._in_force.end(block)
            finally:  # once more, where an interrupt came in between
                self._in_force.end(block)
                self._flip()

    def _use(self, new: Used) -> None:
        old, self._in_force.all = self._in_force.all, new
        self._flip()
        old.end()
        self._let_go()

    def _flip(self) -> None:
        """Let captured graphs know what is in force."""
        if self._graphs:
            self._graphs.flip([used.route for used in self._in_force.everything])

    def _put_in_force(
        self, sets: Sets, each: int | None, act: Callable[[Used], None]
    ) -> None:
        """Do this with what is asked for, leased and with all in place that it needs.

        Others go on while adapters come from disk. On any error what is in force stays as
        it is.
        """
        names = list(dict.fromkeys(name for one in sets for name in one))
        acts = [name for name in names if any(one.get(name) for one in sets)]
        while True:
            with self._lock:
                self._unmerged()
                keys = {name: self._get(name).key for name in names}
                if acts:
                    self._rivals.check()
                    self._check_in_place(acts)
            try:
                lease = self._bank.lease(keys[name] for name in acts)
            except NotFoundError:  # unloaded meanwhile
                if keys == {name: self._get(name).key for name in names}:
                    raise
                continue
            try:
                with self._lock:
                    self._unmerged()
                    if keys == {name: self._get(name).key for name in names}:
                        act(Used(sets, each, self._route(sets, each, lease), lease))
                        return
            except BaseException:
                # What came into force before an interrupt stays leased.
                if all(used.lease is not lease for used in self._in_force.everything):
                    lease.release()
                raise
            lease.release()  # swapped meanwhile

    def _used(self, sets: Sets, each: int | None) -> Used:
        """Return what is asked for, leased and with all in place that it needs to act.

        On any error what is in force stays as it is.
        """
        acts = {name for one in sets for name, weight in one.items() if weight}
        self._check_in_place(acts)
        lease = self._bank.lease(self._get(name).key for name in acts)
        try:
            return Used(sets, each, self._route(sets, each, lease), lease)
        except BaseException:
            lease.release()
            raise

    def _route(self, sets: Sets, each: int | None, lease: Lease) -> Route:
        acting = [self._set(one, lease) for one in sets]
        route = (
            for_all(acting[0] if acting else ()) if each is None else by_rows(acting, each)
        )
        self._put_on(route)
        return route

    def _set(self, weights: Weights, lease: Lease) -> Set:
        """Return what acts together; an adapter of two names once."""
        acting: dict[Resident, float] = {}
        for name, weight in weights.items():
            if not weight:
                continue  # the base alone, bit for bit
            resident = lease.residents[self._get(name).key]
            if abs(weight) > resident.heaviest:
                raise ComposeError(
                    f"with the weight {weight:g} the adapter has numbers that are not "
                    "finite in the dtype which is computed in",
                    where=name,
                    hint=f"its weight may be up to {resident.heaviest:.3g}",
                )
            acting[resident] = acting.get(resident, 0.0) + weight
        return tuple((resident, weight) for resident, weight in acting.items() if weight)

    def _put_on(self, route: Route) -> None:
        """Have all in place that the route needs to act."""
        if self._graphs:
            self._graphs.check(route)
        self._hooks.forget_broken_off()
        if route.entries:
            with self._hooks.changing:
                self._hooks.when_idle(None)
                self._put_on_hooks(route)

    def _put_on_hooks(self, route: Route) -> None:
        if not route.adds_only:
            for segment in route.segments:
                self._twins.put_on(segment.set)
                route.dropped[segment.set] = self._twins.dropped(segment.set)
        is_more = not route.adds_only or self._hooks.is_more_than_added
        self._hooks.is_more_than_added |= not route.adds_only
        if self._hooks.put_on(route.sites) or is_more:
            _forget_compiled()

    def _let_go(self) -> None:
        """Take off what nothing in force needs, once the forwards that need it are over."""
        self._hooks.forget_broken_off()
        everything = self._in_force.everything
        is_bare = not self._in_force.is_any_open and not self._in_force.all.route.entries
        # Hooks that compiled code has seen stay, so that nothing is compiled again.
        if is_bare and not self._hooks.is_traced and not self._is_reserved:
            self._hooks.when_idle(partial(_take_off, self._hooks, self._twins))
        elif all(each.route.adds_only for each in everything):
            self._hooks.when_idle(partial(_take_off_twins, self._hooks, self._twins))

    def _take_in(self, name: str, made: Loaded, old: Loaded | None) -> None:
        """Give the name to what was loaded, wherever it is used."""
        try:
            with self._lock:
                self._unmerged()
                if self._loaded.get(name) is not old or made.key not in self._bank:
                    raise InputError(
                        "another thread loaded, exchanged or unloaded an adapter of this "
                        "name meanwhile",
                        where=name,
                        hint="look at host.adapters and decide again",
                    )
                self._name(name, made)
                try:
                    self._in_place.watch(made.modules)
                    if old is not None and old.key != made.key:
                        self._use_again(name)
                except BaseException:
                    self._name(name, old)
                    raise
        except BaseException:
            self._drop(made.key)
            raise
        if old is not None:
            self._drop(old.key)

    def _use_again(self, name: str) -> None:
        concerned = [each for each in self._in_force.everything if name in each.names]
        new: list[Used] = []
        try:
            new += (self._used(each.sets, each.each) for each in concerned)
        except BaseException:
            for used in new:
                used.release()
            raise
        for each, used in zip(concerned, new, strict=True):
            each.exchange(used)
        self._flip()

    def _name(self, name: str, loaded: Loaded | None) -> None:
        """Let a name mean this adapter, or none any more."""
        before = self._loaded.pop(name, None)
        if before is not None:
            self._by_key[before.key].pop(name, None)
        if loaded is not None:
            self._loaded[name] = loaded
            self._by_key.setdefault(loaded.key, {})[name] = loaded

    def _loaded_already(
        self, adapter: Adapter, known: Loaded | None = None
    ) -> Loaded | None:
        """Return the same adapter, of whatever name, where it is loaded.

        Raises:
            FitError: a layer it acts on was replaced since.
        """
        with self._lock:
            self._unmerged()
            if known is None and adapter.digest is not None:
                same = self._by_key.get(adapter.digest)
                known = next(iter(same.values())) if same else None
            gone = self._in_place.gone()
        if known is not None and not gone.isdisjoint(known.modules):
            name = known.report.name
            raise FitError(
                "the adapter is loaded, and a layer it acts on was replaced since",
                where=name,
                hint=f"host.unload({name!r}) first",
            )
        return known

    @contextmanager
    def _tidy(self) -> Iterator[None]:
        """Leave nothing in the bank without a name, wherever an interrupt comes.

        Nothing is merged inside of the block.
        """
        with self._lock:
            self._changes += 1
        try:
            yield
        except BaseException:
            self._is_untidy = True
            raise
        finally:
            with self._lock:
                self._changes -= 1
                if self._is_untidy and not self._changes:
                    self._is_untidy = False
                    self._sweep()

    def _sweep(self) -> None:
        self._by_key.clear()
        for name, loaded in self._loaded.items():
            self._by_key.setdefault(loaded.key, {})[name] = loaded
        for key in self._bank.keys:
            self._drop(key)

    def _drop(self, key: str) -> None:
        """Let the bank forget an adapter that no name means any more."""
        with self._lock:
            if key in self._bank and not self._by_key.get(key):
                self._by_key.pop(key, None)
                self._bank.drop(key)

    def _acting(self, name: str, weight: float) -> Acting:
        key = self._get(name).key
        with self._bank.lease([key]) as lease:
            tokens = lease.residents[key].tokens
        return Acting(name, self._bank.again(key), weight, tokens)

    def _left(self, left: Sequence[Acting], weights: dict[str, float]) -> Used:
        """Return what goes on to act on outputs while the rest is in the weights."""
        acting = tuple(
            (reside(each.prepared, self._sites, name=each.name, key=""), each.weight)
            for each in left
        )
        route = for_all(acting)
        self._put_on(route)
        return Used((weights,), None, route)

    def _attached(self) -> nn.Module:
        if self._model is None:
            raise InputError(
                "the host was detached from its model", hint="attach a new one to the model"
            )
        return self._model

    def _unmerged(self) -> nn.Module:
        model = self._attached()
        if self._merged is not None:
            raise InputError(
                "adapters are merged into the weights, and what acts is fixed until they "
                "are restored",
                hint="host.unmerge() first",
            )
        return model

    def _get(self, name: str) -> Loaded:
        try:
            return self._loaded[name]
        except KeyError:
            raise NotFoundError(
                "no adapter of this name is loaded",
                where=name,
                hint=f"loaded: {', '.join(self._loaded)} (names without versions)"
                if self._loaded
                else "nothing is loaded; host.load(...) first",
            ) from None

    def _check_in_place(self, names: Collection[str]) -> None:
        """Refuse layers that the model does not call any more: a hook would do nothing."""
        gone = self._in_place.gone()
        for name in names if gone else ():
            for module in self._get(name).modules:
                if module in gone:
                    raise FitError(
                        f"the layer {self._in_place.path(module)} was replaced after the "
                        "adapter was loaded",
                        where=name,
                        hint=f"host.unload({name!r}) and load it again",
                    )


def _take_off(hooks: Hooks, twins: Twins) -> None:
    if hooks.is_traced:
        _forget_compiled()
    hooks.take_off()
    _take_off_twins(hooks, twins)


def _take_off_twins(hooks: Hooks, twins: Twins) -> None:
    if hooks.is_more_than_added:
        _forget_compiled()
    hooks.is_more_than_added = False
    twins.take_off()


def _forget_compiled() -> None:
    """Let torch compile anew what it compiled: compiled code does not see other hooks."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
