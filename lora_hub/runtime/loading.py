"""From what a user names to an adapter in the bank: found, compared with the model, ready.

Where it comes from is told by `find`; whether it belongs to the model by `report.py` and
`prepare.py`. Of a package, nothing is kept beside what the bank holds: its bytes can be
read again, and are compared with its digest each time.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from torch import nn

from lora_hub.adapter.adapter import Adapter
from lora_hub.adapter.load import load
from lora_hub.base.fit import Fit
from lora_hub.errors import InputError
from lora_hub.formats.source import AdapterSource
from lora_hub.manifest.document import Base, Policy
from lora_hub.runtime.alike import Structures
from lora_hub.runtime.bank import Bank, Reload
from lora_hub.runtime.base_view import Known, ModelBase
from lora_hub.runtime.prepare import Norms, Prepared, prepare
from lora_hub.runtime.report import LoadReport, fit_of, unidentified
from lora_hub.runtime.same_adapter import is_same

What = str | Path | Adapter


class Found(Protocol):
    """What `find` says a reference or a folder is.

    `name`, `version`, `digest` and `base` are None for a folder without a manifest; `notes`
    are what a person should hear, e.g. that a version was yanked; `again` reads the same
    bytes once more, and is None where nothing would prove that they are.
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
    @property
    def again(self) -> Callable[[], AdapterSource] | None: ...


Find = Callable[[str | Path], Found]


@dataclass(frozen=True, slots=True)
class Given:
    """An adapter that was found.

    Attributes:
        name: by which the host will know it.
        again: reads it once more, None where it is kept.
    """

    adapter: Adapter
    name: str
    notes: tuple[str, ...] = ()
    again: Callable[[], AdapterSource] | None = None


@dataclass(frozen=True, slots=True)
class Loaded:
    """An adapter of the bank, under a name.

    Attributes:
        key: by which the bank knows it.
        adapter: kept where no digest says what it is.
        modules: on which it acts.
        about: what a person should hear of it on this model.
    """

    key: str
    report: LoadReport
    adapter: Adapter | None
    modules: tuple[nn.Module, ...]
    about: tuple[str, ...]

    def is_same(self, other: Adapter) -> bool:
        """Return whether this is that adapter."""
        if self.adapter is None:
            return self.report.digest == other.digest
        return is_same(self.adapter, other)


class Loader:
    """Loads adapters for one model into its bank."""

    def __init__(self, model: nn.Module, find: Find | None, bank: Bank) -> None:
        self._model = model
        self._find = find
        self._bank = bank
        self._digests: Known = {}
        self._numbers = itertools.count()
        self._structures = Structures(model)

    def found(self, what: What, as_: str | None) -> Given:
        """Return the adapter that is meant, in the host's memory.

        Raises:
            InputError: it has no name and none is given; or a reference is to be found
                where no `find` is.
            LoraHubError: it is not found or not trusted.
        """
        if isinstance(what, Adapter):
            return Given(what, _name(as_ or what.name, None))
        if self._find is None:
            raise InputError(
                "this host was not told where adapters are found",
                where=str(what),
                hint="attach with lora_hub.attach(model, registry=...), or load an adapter "
                "in memory",
            )
        found = self._find(what)
        name = _name(as_ or found.name, str(what))
        adapter = load(
            found.source,
            name=found.name,
            version=found.version,
            digest=found.digest,
            base=found.base,
        )
        return Given(adapter, name, found.notes, found.again)

    def loaded(
        self, given: Given, policy: Policy | None, known: Loaded | None = None
    ) -> Loaded:
        """Return the adapter compared with the model and taken into the bank.

        Args:
            given: what was found.
            policy: how strictly the base is compared.
            known: the same adapter where it is loaded already, and the layers it acts on
                are in place; it is then compared with the base and nothing else.

        Raises:
            FitError, InconclusiveError, ComposeError, InputError: as `Host.load`.
        """
        adapter, name = given.adapter, given.name
        fit = fit_of(adapter, lambda: ModelBase(self._model, self._digests), policy, name)
        if known is not None:
            report = _report(given, fit, known.about)
            return replace(known, report=report)
        prepared = prepare(self._model, adapter, where=name, structures=self._structures)
        key = adapter.digest or f"memory:{next(self._numbers)}"
        self._bank.put(
            key,
            prepared,
            name=name,
            tokens=adapter.alora_tokens,
            reload=None if given.again is None else self._reload(given, given.again),
        )
        about = (*prepared.notes, *unidentified(adapter))
        report = _report(given, fit, about)
        kept = None if adapter.digest else adapter
        return Loaded(key, report, kept, prepared.modules, about)

    def _reload(self, given: Given, again: Callable[[], AdapterSource]) -> Reload:
        model, name, structures = self._model, given.name, self._structures
        version, digest = given.adapter.version, given.adapter.digest

        def reload(norms: Norms) -> Prepared:
            adapter = load(again(), name=name, version=version, digest=digest)
            return prepare(model, adapter, where=name, norms=norms, structures=structures)

        return reload


def _report(given: Given, fit: Fit | None, about: tuple[str, ...]) -> LoadReport:
    adapter = given.adapter
    return LoadReport(
        name=given.name,
        version=adapter.version,
        digest=adapter.digest,
        targets=len(adapter.updates) + len(adapter.replaced),
        fit=fit,
        notes=(*given.notes, *about),
    )


def _name(name: str | None, where: str | None) -> str:
    if name:
        return name
    raise InputError(
        "the adapter has no name of its own",
        where=where,
        hint='give it one: host.load(..., as_="mine")',
    )
