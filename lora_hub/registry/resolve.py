"""A reference → the one version of one name that it means."""

from collections.abc import Callable
from dataclasses import dataclass

from lora_hub import refs
from lora_hub.errors import NotFoundError
from lora_hub.refs import Reference
from lora_hub.registry.registry import Entry, Registry


@dataclass(frozen=True, slots=True)
class Resolved:
    """A version, named by digests from here on.

    Attributes:
        package: digest of the manifest.
        signature: digest of `model.sig`.
        size_bytes: of all files together.
        notes: what the user should hear.
    """

    full_name: str
    version: str
    package: str
    signature: str
    size_bytes: int
    notes: tuple[str, ...] = ()


def resolve(reference: Reference, registry: Registry) -> Resolved:
    """Return the version that the reference means.

    `latest` is the highest release that is not withdrawn; a range takes the highest
    version in it by the rules of PEP 440, so pre-releases only where it names one. A
    version or digest may name a withdrawn one.

    Raises:
        NotFoundError: the name does not exist, or nothing satisfies the selector.
    """
    entries = registry.versions(reference.full_name)
    selector = reference.selector
    exact = [entry for entry in entries if selector in (entry.version, entry.package)]
    if exact:
        return resolved(exact[-1])
    if not selector.startswith("sha256:") and not refs.is_version(selector):
        accepts = _acceptance(selector)
        for entry in reversed(entries):
            if entry.yanked is None and accepts(entry.version):
                return resolved(entry)
    raise NotFoundError(
        _nothing(selector, entries),
        where=reference.full_name,
        hint=f"versions: {', '.join(map(_shown, entries))}",
    )


def _acceptance(selector: str) -> Callable[[str], bool]:
    if selector == "latest":
        return lambda version: not refs.parse_version(version).is_prerelease
    wanted = refs.parse_range(selector)
    return lambda version: wanted.contains(refs.parse_version(version))


def resolved(entry: Entry) -> Resolved:
    """Return the entry as what a reference resolves to."""
    notes: tuple[str, ...] = ()
    if entry.yanked is not None:
        notes = (f"{entry.full_name} {entry.version} was withdrawn: {entry.yanked}",)
    return Resolved(
        full_name=entry.full_name,
        version=entry.version,
        package=entry.package,
        signature=entry.event.signature,
        size_bytes=entry.event.size_bytes,
        notes=notes,
    )


def _nothing(selector: str, entries: tuple[Entry, ...]) -> str:
    if selector != "latest":
        return f"no version satisfies {selector!r}"
    if all(entry.yanked is not None for entry in entries):
        return "every version was withdrawn"
    return "there are only pre-releases, which have to be named"


def _shown(entry: Entry) -> str:
    return entry.version if entry.yanked is None else f"{entry.version} (withdrawn)"
