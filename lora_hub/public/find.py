"""From what a user types to an adapter's bytes: one road, for the shell and for Python.

A name goes through the registry: resolved, fetched into the cache, its signature verified
with the keys trusted for its namespace. What is used is then read into memory and compared
with the signed digests there, so the bytes that were checked are the bytes that are used. A
path is the user's own: a package there must be what its manifest says, no signature is
asked, and the notes say so.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lora_hub import refs, settings
from lora_hub.errors import InputError, IntegrityError
from lora_hub.formats.source import AdapterSource
from lora_hub.manifest.document import MANIFEST_NAME, Base, Manifest

if TYPE_CHECKING:
    from lora_hub.formats.dialect import ReadOptions
    from lora_hub.registry.pull import Pulled
    from lora_hub.registry.registry import Registry

PathLike = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class Found:
    """What a reference or a path turned out to be.

    Attributes:
        digest: of the package, None where it is none.
        again: of a package, reads the same bytes again from where they lie now, and
            compares them with the digest. None where nothing would say that they are.
    """

    source: AdapterSource
    manifest: Manifest | None = None
    digest: str | None = None
    notes: tuple[str, ...] = ()
    again: Callable[[], AdapterSource] | None = None

    @property
    def name(self) -> str | None:
        return self.manifest.name if self.manifest else None

    @property
    def version(self) -> str | None:
        return self.manifest.version if self.manifest else None

    @property
    def base(self) -> Base | None:
        return self.manifest.base if self.manifest else None


def find(
    what: PathLike,
    registry: PathLike | None = None,
    *,
    options: "ReadOptions | None" = None,
    dialect: str | None = None,
) -> Found:
    """Return the adapter that a reference or a path means.

    Args:
        what: a reference, or the path of a package, an adapter's folder or a file in it.
        registry: where references are looked up.
        options: what no file of a bare adapter says.
        dialect: what a bare adapter is, where two could be meant.

    Raises:
        InputError: options or a dialect are given for a package.
        LoraHubError: it is not there, not readable, or not to be trusted.
    """
    text = os.fspath(what)
    if not isinstance(what, str) or refs.is_path(text):
        return _in_folder(settings.expanded(text), options, dialect)
    _refuse_said(text, options, dialect)
    from lora_hub.package.package import load_source

    fetched = fetch(text, registry)
    package = fetched.package
    again = partial(_again, fetched.folder, package.digest)
    return Found(
        load_source(package), package.manifest, package.digest, fetched.notes, again
    )


def fetch(reference: str, registry: PathLike | None = None) -> "Pulled":
    """Return the published package a reference names, in the cache and verified."""
    from lora_hub.registry import pull
    from lora_hub.registry.cache import Cache
    from lora_hub.registry.trust import TrustStore

    parsed = refs.parse(reference)
    opened = open_registry(parsed.registry or registry)
    return pull.pull(parsed, opened, Cache(), TrustStore())


def open_registry(registry: PathLike | None = None) -> "Registry":
    """Return the registry of a folder or a configured name; the default one without."""
    from lora_hub.registry import registry as registries

    location = settings.registry_location(None if registry is None else os.fspath(registry))
    return registries.open_registry(location)


def _in_folder(folder: Path, options: "ReadOptions | None", dialect: str | None) -> Found:
    if not os.path.exists(folder / MANIFEST_NAME):  # false, too, where we may not look
        from lora_hub.formats.detect import open_adapter

        return Found(open_adapter(folder, options, dialect=dialect))
    _refuse_said(str(folder), options, dialect)
    from lora_hub.package.package import check_complete, load_source, open_package

    package = open_package(folder)
    check_complete(package)
    return Found(
        load_source(package),
        package.manifest,
        package.digest,
        ("named by its path, so its signature was not asked for",),
        partial(_again, folder, package.digest),
    )


def _again(folder: Path, digest: str) -> AdapterSource:
    """Return a package's adapter, which was found and judged before, read once more.

    Raises:
        IntegrityError: the package is another one now, or damaged.
        LoraHubError: it is not there any more.
    """
    from lora_hub.package.package import load_source, open_package

    package = open_package(folder)
    if package.digest != digest:
        raise IntegrityError(
            f"the package is {package.digest} now, it was {digest} when it was loaded",
            where=str(folder),
            hint="load it anew",
        )
    return load_source(package)


def _refuse_said(where: str, options: "ReadOptions | None", dialect: str | None) -> None:
    """Raise `InputError` where something is said of a package, which says all by itself."""
    from lora_hub.formats.dialect import ReadOptions

    # A merge has one base for bare adapters and packages alike, which need none to be read.
    said = replace(options, base=None) if options else ReadOptions()
    if dialect is not None or said != ReadOptions():
        raise InputError(
            "this is a package: its files leave nothing open",
            where=where,
            hint="leave out how to read it (the dialect, scale_from, alpha)",
        )
