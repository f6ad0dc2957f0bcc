"""A path → everything that is wrong there. Nothing found is raised.

What the path is decides which checks run: a package, an adapter's bare folder, or a
registry, whose every published version is then checked as a package.
"""

import contextlib
from collections.abc import Callable, Collection
from pathlib import Path

from lora_hub import strict_json
from lora_hub.errors import DocumentError, InputError, LoraHubError
from lora_hub.formats.detect import PICKLES, open_adapter
from lora_hub.manifest.document import MANIFEST_NAME
from lora_hub.package import layout
from lora_hub.package.package import read_package
from lora_hub.registry.check import check as check_whole
from lora_hub.registry.fetch import open_published
from lora_hub.registry.registry import CONFIG, Registry, open_registry
from lora_hub.registry.resolve import Resolved
from lora_hub.registry.trust import TrustStore
from lora_hub.validation.findings import Finding, finding, from_error
from lora_hub.validation.package import check_package, try_source
from lora_hub.validation.weights import check_numbers


def validate(path: Path) -> tuple[Finding, ...]:
    """Return what is wrong with a package, an adapter's folder or a registry.

    Raises:
        InputError: there is no such folder.
    """
    if not path.is_dir():
        raise InputError(
            "is no folder" if path.exists() else "there is no such folder",
            where=str(path),
            hint="give the folder of a package, an adapter or a registry",
        )
    check = next(check for is_kind, check in _KINDS if is_kind(path))
    return tuple(check(path))


def _check_package(folder: Path) -> list[Finding]:
    try:
        names = layout.list_files(folder)
    except LoraHubError as error:
        return [from_error("LH012", error, str(folder))]
    read = layout.reader(folder)
    return check_package(read, names, _pinned_keys(read, names), where=str(folder))


def _pinned_keys(read: Callable[[str], bytes], names: Collection[str]) -> tuple[bytes, ...]:
    """Return the keys that the user's trust store pins for the package's namespace."""
    # What is wrong with the manifest or the store is said elsewhere.
    with contextlib.suppress(LoraHubError):
        package = read_package(read, names, where="")
        pin = TrustStore().get(package.manifest.name.partition("/")[0])
        return pin.public_keys if pin else ()
    return ()


def _check_adapter(folder: Path) -> list[Finding]:
    where = str(folder)
    source, found = try_source(lambda: open_adapter(folder), where)
    found += [
        finding("LH023", str(path), "this is a pickle")
        for path in sorted(folder.iterdir())
        if path.name.lower().endswith(PICKLES)
    ]
    if source is None:
        return found
    if source.base_name is None:
        found.append(finding("LH024", where, "the config names no base"))
    elif source.base_name.startswith(("/", ".", "~")) or "\\" in source.base_name:
        found.append(finding("LH024", where, "the config names its base by a local path"))
    return found + check_numbers(source)


def _check_registry(folder: Path) -> list[Finding]:
    registry = open_registry(folder)
    found = [
        finding("LH050", problem.where, problem.message, problem.hint)
        for problem in check_whole(registry)
    ]
    for name in registry.names():
        # What stops us here, the check of the whole registry has said.
        with contextlib.suppress(LoraHubError):
            found += _check_versions(registry, name)
    return found


def _check_versions(registry: Registry, name: str) -> list[Finding]:
    found = []
    keys = registry.keys(name.partition("/")[0])
    for entry in registry.versions(name):
        event = entry.event
        resolved = Resolved(
            name, entry.version, entry.package, event.signature, event.size_bytes
        )
        with contextlib.suppress(LoraHubError):
            package = open_published(resolved, registry)
            found += check_package(package.read, package.names, keys, where=package.where)
    return found


def _is_registry(folder: Path) -> bool:
    try:
        config = strict_json.read_object(folder / CONFIG)
    except DocumentError:
        return False
    return str(config.get("schema", "")).startswith("lorahub.registry/")


_KINDS: tuple[tuple[Callable[[Path], bool], Callable[[Path], list[Finding]]], ...] = (
    (lambda folder: (folder / MANIFEST_NAME).exists(), _check_package),
    (_is_registry, _check_registry),
    (lambda folder: True, _check_adapter),
)
