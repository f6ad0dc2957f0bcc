"""`Host`: adapters on a running model, without changing it.

    host = Host(model, find)
    host.load("style/shakespeare")         # found, checked against the model, on its device
    host.use({"style/shakespeare": 0.7})   # acts from the next call of the model on
    host.detach()                          # the model is the object it was

Parameters are never written to: the effect of what is used rides on forward hooks, which
exist only while an adapter is used (`hooks.py`). Most add to what a layer gives
(`effect.py`); what replaces a tensor, and what changes experts, stands in for it while its
module runs (`swap.py`). Where adapters come from is told by `find`; whether they belong to
the model by `report.py` and `prepare.py`.

A host is for one thread at a time, and one host for a model. A deep copy of a model keeps
what acted when it was copied, and no host takes that off it.
"""

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import torch
from torch import nn

from lora_hub.adapter.adapter import Adapter
from lora_hub.adapter.load import load
from lora_hub.errors import FitError, InputError, NotFoundError
from lora_hub.formats.source import AdapterSource
from lora_hub.manifest.document import Base, Policy
from lora_hub.runtime.base_view import Known, ModelBase
from lora_hub.runtime.hooks import Acting, Acts
from lora_hub.runtime.prepare import Prepared, prepare
from lora_hub.runtime.report import LoadReport, fit_of, unidentified
from lora_hub.runtime.same_adapter import is_same

Weights = Mapping[str, float]


class Found(Protocol):
    """What `find` says a reference or a folder is.

    `name`, `version`, `digest` and `base` are None for a folder without a manifest; `notes`
    are what a person should hear, e.g. that a version was yanked.
    """

    @property
    def source(self) -> AdapterSource: ...
    @property
    def name(self) -> str | None: ...
    @property
    def version(self) -> str | None: ...
    @property
    def digest(self) -> str | None: ...
    @property
    def base(self) -> Base | None: ...
    @property
    def notes(self) -> tuple[str, ...]: ...


@dataclass(frozen=True, slots=True)
class _Loaded:
    adapter: Adapter
    prepared: Prepared
    report: LoadReport


class Host:
    """Adapters on one model.

    Args:
        model: any `torch.nn.Module`; targets are paths of its modules.
        find: turns a reference or a folder into an adapter whose bytes are verified.
            Without it only adapters in memory can be loaded.
    """

    def __init__(
        self, model: nn.Module, find: Callable[[str | Path], Found] | None = None
    ) -> None:
        self._model: nn.Module | None = model
        self._find = find
        self._loaded: dict[str, _Loaded] = {}
        self._used: dict[str, float] = {}
        self._outer: list[dict[str, float]] = []  # what open `using` blocks will restore
        self._acts: Acts | None = None
        self._digests: Known = {}

    def __repr__(self) -> str:
        if self._model is None:
            return "Host(detached)"
        loaded = ", ".join(self._loaded) or "none"
        used = ", ".join(f"{name}={weight:g}" for name, weight in self._used.items())
        model = type(self._model).__name__
        return f"Host({model}, loaded: {loaded}, used: {used or 'none'})"

    @property
    def adapters(self) -> Mapping[str, LoadReport]:
        """The loaded adapters by name, each with the report of its loading."""
        return MappingProxyType({name: each.report for name, each in self._loaded.items()})

    @property
    def used(self) -> Weights:
        """Name → weight of the adapters that act now; empty where the base acts alone."""
        return MappingProxyType(dict(self._used))

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
        changes nothing.

        Args:
            what: a reference, a folder, or an adapter in memory.
            as_: the name to know it by; its own by default.
            policy: how strictly the base is compared; as the manifest says by default.

        Raises:
            FitError: the adapter was made for another base, or a target is not there.
            InconclusiveError: the base is to be compared and the adapter does not name it.
            InputError: it has no name and none is given, or the name is taken by another
                adapter.
            LoraHubError: `find` did not find it or does not trust it.
        """
        model = self._attached()
        adapter, notes = self._adapter(what)
        name = _name(as_ or adapter.name, what)
        fit = fit_of(adapter, ModelBase(model, self._digests), policy, name)
        loaded = self._loaded.get(name)
        again = loaded is not None and is_same(loaded.adapter, adapter)
        if not again:
            self._check_free(name)
        prepared = prepare(model, adapter, where=name)
        report = LoadReport(
            name=name,
            version=adapter.version,
            digest=adapter.digest,
            targets=len(adapter.updates) + len(adapter.replaced),
            fit=fit,
            notes=(*notes, *prepared.notes, *unidentified(adapter)),
        )
        if loaded is not None and again:
            self._loaded[name] = replace(loaded, report=report)
        else:
            self._loaded[name] = _Loaded(adapter, prepared, report)
        return report

    def use(self, what: str | Weights | None) -> None:
        """Let these adapters act from the next call of the model on, and no others.

        Args:
            what: a name (weight 1.0), names with their weights, or None for the base alone.
                Weights are finite; the deltas add up, each times its weight.

        Raises:
            NotFoundError: a name is not loaded; what was used before stays used.
            InputError: a weight is no finite number, or makes one that the dtype which is
                computed in cannot hold.
            FitError: a layer of the model was replaced since the adapter was loaded.
        """
        model = self._attached()
        weights = self._weights(what)
        acts = self._act(model, weights)  # first, so that a failure changes nothing
        if acts is not None or self._acts is not None:
            _forget_compiled()
        self._take_off()
        if acts is not None:
            acts.put_on(model)
        self._acts = acts
        self._used = weights

    @contextmanager
    def using(self, what: str | Weights | None) -> Iterator[None]:
        """Use these adapters inside a `with` block, then again what was used before.

        Raises:
            NotFoundError, InputError, FitError: as `use`.
        """
        before = self._used
        self.use(what)
        self._outer.append(before)
        try:
            yield
        finally:
            self._outer.pop()
            if self._model is not None:  # a block may detach
                self.use(before)

    def unload(self, name: str) -> None:
        """Let an adapter go.

        Raises:
            NotFoundError: the name is not loaded.
            InputError: the adapter is used now, or a `using` block will use it again.
        """
        self._attached()
        self._get(name)
        if any(name in used for used in (self._used, *self._outer)):
            raise InputError(
                "the adapter is in use and cannot be unloaded",
                where=name,
                hint="host.use(None) first, outside of `with host.using(...)`",
            )
        del self._loaded[name]

    def detach(self) -> None:
        """Take the host off: no hook is left and the model is the object it was.

        The host lets all adapters go and cannot be used again. Detaching twice is fine.
        """
        if self._acts is not None:
            _forget_compiled()
        self._take_off()
        self._used = {}
        self._loaded.clear()
        self._digests.clear()
        self._model = None

    def _attached(self) -> nn.Module:
        if self._model is None:
            raise InputError(
                "the host was detached from its model", hint="attach a new one to the model"
            )
        return self._model

    def _adapter(self, what: str | Path | Adapter) -> tuple[Adapter, tuple[str, ...]]:
        if isinstance(what, Adapter):
            return what, ()
        if self._find is None:
            raise InputError(
                "this host was not told where adapters are found",
                where=str(what),
                hint="attach with lora_hub.attach(model, registry=...), or load an adapter "
                "in memory",
            )
        found = self._find(what)
        adapter = load(
            found.source,
            name=found.name,
            version=found.version,
            digest=found.digest,
            base=found.base,
        )
        return adapter, found.notes

    def _check_free(self, name: str) -> None:
        if name in self._loaded:
            raise InputError(
                "another adapter is loaded under this name",
                where=name,
                hint=f"host.unload({name!r}) first, or give this one a name with as_=...",
            )

    def _get(self, name: str) -> _Loaded:
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

    def _weights(self, what: str | Weights | None) -> dict[str, float]:
        if what is None:
            return {}
        weights = {what: 1.0} if isinstance(what, str) else dict(what)
        for name, weight in weights.items():
            self._get(name)
            if not _is_finite(weight):
                raise InputError(
                    f"the weight is {weight!r}, expected a finite number", where=name
                )
        return {name: float(weight) for name, weight in weights.items()}

    def _act(self, model: nn.Module, weights: Weights) -> Acts | None:
        """Return the hooks of what is to be used, None where that is the base alone."""
        acting = []
        for name, weight in weights.items():
            if weight == 0:
                continue  # the base alone, bit for bit
            loaded = self._loaded[name]
            _check_in_place(model, loaded.prepared, name)
            tokens = loaded.adapter.alora_tokens
            acting.append(Acting(name, loaded.prepared, weight, tokens))
        return Acts(acting) if acting else None

    def _take_off(self) -> None:
        if self._acts is not None:
            self._acts.take_off()
        self._acts = None


def _check_in_place(model: nn.Module, prepared: Prepared, name: str) -> None:
    """Refuse layers that the model does not call any more: a hook would do nothing."""
    called = set(model.modules())
    places = {target: aimed.place for target, aimed in prepared.updates.items()}
    places |= {tensor: place for tensor, (place, _) in prepared.replaced.items()}
    for target, place in places.items():
        if place.module not in called:
            raise FitError(
                f"the layer {target} was replaced after the adapter was loaded",
                where=name,
                hint=f"host.unload({name!r}) and load it again",
            )


def _forget_compiled() -> None:
    """Let torch compile anew what it compiled: compiled code does not see other hooks."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _is_finite(weight: object) -> bool:
    if not isinstance(weight, Real) or isinstance(weight, bool):
        return False
    return math.isfinite(weight)


def _name(name: str | None, what: str | Path | Adapter) -> str:
    if name:
        return name
    raise InputError(
        "the adapter has no name of its own",
        where=None if isinstance(what, Adapter) else str(what),
        hint='give it one: host.load(..., as_="mine")',
    )
