"""A resolved version → its folder in the cache and its bytes, all compared with digests.

Each file is read once and hashed once, be it in the registry or in the cache; what was
hashed then stays in memory for who uses it.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from lora_hub.errors import IntegrityError
from lora_hub.manifest import codec
from lora_hub.manifest.document import MANIFEST_NAME, MAX_MANIFEST_BYTES
from lora_hub.package import layout
from lora_hub.package.package import Package, hold, open_package, read_package
from lora_hub.registry.cache import Cache
from lora_hub.registry.registry import Registry
from lora_hub.registry.resolve import Resolved
from lora_hub.signing.envelope import MAX_BUNDLE_BYTES
from lora_hub.signing.statement import SIGNATURE_NAME


@dataclass(frozen=True, slots=True)
class Fetched:
    """A version on this machine.

    Attributes:
        package: held in memory (`hold`): every file has the digest that the manifest says,
            and the manifest the one that the registry says.
        folder: in the cache, read-only.
    """

    package: Package
    folder: Path


def fetch(resolved: Resolved, registry: Registry, cache: Cache) -> Fetched:
    """Return the package, brought to the cache first where it is missing there.

    What the cache has is not asked of the registry again. Who signed it is not looked at
    here (`pull.py` does).

    Raises:
        NotFoundError: the registry lost a file.
        IntegrityError: bytes differ from their digest.
        TrustError: others may write to the cache.
        StoreError: the cache cannot be written.
    """
    folder = cache.get(resolved.package)
    if folder is None:
        package = hold(open_published(resolved, registry))
        folder = cache.put(
            resolved.package, ((name, package.read(name)) for name in package.names)
        )
        return Fetched(replace(package, where=str(folder)), folder)
    package = open_package(folder)
    if package.digest != resolved.package:
        raise IntegrityError(
            f"the manifest has digest {package.digest}, expected {resolved.package}",
            where=str(folder),
            hint="the cache was damaged: `lorahub cache prune`, then pull again",
        )
    check_name(package, resolved)
    return Fetched(hold(package), folder)


def open_published(resolved: Resolved, registry: Registry) -> Package:
    """Return the package as it lies in the registry; files are read when asked for.

    Raises:
        NotFoundError: the registry lost the manifest.
        IntegrityError: the bytes differ from their digest, or the manifest is one of
            another name or version.
    """
    where = f"{resolved.full_name}@{resolved.version}"
    data = registry.blob(resolved.package, max_bytes=MAX_MANIFEST_BYTES)
    manifest = codec.decode(data, where=f"{where}/{MANIFEST_NAME}")
    listed = {file.path: file for file in manifest.files}

    def read(name: str) -> bytes:
        if name == MANIFEST_NAME:
            return data
        if name == SIGNATURE_NAME:
            return registry.blob(resolved.signature, max_bytes=MAX_BUNDLE_BYTES)
        # The size is the publisher's word; the limit is ours.
        size = min(listed[name].size, layout.max_bytes(name))
        return registry.blob(listed[name].sha256, max_bytes=size)

    # Blobs are read by their digests, which are those that the manifest lists.
    names = {*listed, MANIFEST_NAME, SIGNATURE_NAME}
    package = read_package(read, names, where=where, is_compared=True)
    check_name(package, resolved)
    return package


def check_name(package: Package, resolved: Resolved) -> None:
    """Raise `IntegrityError` unless the package says the name it was found under."""
    found = f"{package.manifest.name} {package.manifest.version}"
    expected = f"{resolved.full_name} {resolved.version}"
    if found != expected:
        raise IntegrityError(
            f"the registry calls the package {expected}, the package itself {found}",
            where=package.where,
        )
