"""Registries as users call them: make one, push, pull, yank. No torch."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_hub import atomic, refs, settings
from lora_hub.public.keys import read_key

if TYPE_CHECKING:
    from lora_hub.registry.publish import PushResult
    from lora_hub.registry.registry import Registry
    from lora_hub.signing.keys import PrivateKey

PathLike = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class Pulled:
    """A package on this machine, every byte checked.

    Attributes:
        package: the package digest.
        fingerprint: of the key that signed it.
        folder: where it lies.
        notes: what a person should hear, such as that a key was pinned.
    """

    name: str
    version: str
    package: str
    fingerprint: str
    folder: Path
    notes: tuple[str, ...]


def init_registry(folder: PathLike, *, name: str) -> "Registry":
    """Make the folder a registry, or leave it as it is when it is one of that name."""
    from lora_hub.registry.registry import init

    return init(Path(folder), name)


def push(
    package: PathLike, registry: PathLike | None = None, key: PathLike | None = None
) -> "PushResult":
    """Publish a signed package folder.

    Args:
        package: a package folder with its `model.sig`.
        registry: a folder or a configured name.
        key: the file of the signer's public key. Needed when the namespace is new, which
            the key then owns; `keygen`'s default key is tried without.

    Raises:
        TrustError: not signed, or by a key that may not publish in the namespace.
        AlreadyExists: the version is there with other bytes.
    """
    from lora_hub.package.package import open_package
    from lora_hub.public.find import open_registry
    from lora_hub.registry.publish import push as publish
    from lora_hub.registry.trust import TrustStore

    opened = open_package(Path(package))
    return publish(
        opened, open_registry(registry), public_key=_own_key(key), trust=TrustStore()
    )


def yank(
    reference: str, reason: str, key: PathLike, *, registry: PathLike | None = None
) -> bool:
    """Withdraw a version; return False if it is withdrawn already.

    Args:
        reference: `namespace/name@version`, an exact version.
        reason: what users are told.
        key: the file of a private key of the namespace.
        registry: a folder or a configured name.

    Raises:
        NotFoundError: there is no such version.
        TrustError: the key does not sign for the namespace.
    """
    from lora_hub.registry import publish

    opened, parsed, private = _version_and_key(reference, key, registry)
    return publish.yank(opened, parsed.full_name, parsed.selector, reason, private)


def unyank(reference: str, key: PathLike, *, registry: PathLike | None = None) -> bool:
    """Bring a withdrawn version back; return False if it is not withdrawn.

    Arguments and errors as those of `yank`.
    """
    from lora_hub.registry import publish

    opened, parsed, private = _version_and_key(reference, key, registry)
    return publish.unyank(opened, parsed.full_name, parsed.selector, private)


def _version_and_key(
    reference: str, key: PathLike, registry: PathLike | None
) -> "tuple[Registry, refs.Reference, PrivateKey]":
    from lora_hub.public.find import open_registry
    from lora_hub.signing import keys

    parsed = refs.parse(reference)
    refs.parse_version(parsed.selector)
    opened = open_registry(parsed.registry or registry)
    return opened, parsed, keys.private_key(read_key(key), where=str(key))


def pull(
    reference: str, registry: PathLike | None = None, out: PathLike | None = None
) -> Pulled:
    """Get the package a reference names: resolved, fetched, verified.

    Args:
        reference: `namespace/name[@selector]`.
        registry: a folder or a configured name.
        out: a folder to copy the package to; without it the package stays in the cache.

    Raises:
        NotFoundError: the name or version does not exist.
        IntegrityError, TrustError: what was fetched is not what a trusted key signed.
    """
    from lora_hub.public.find import fetch

    fetched = fetch(reference, registry)
    folder = fetched.folder
    if out is not None:
        folder = Path(out)
        with atomic.new_folder(folder) as temporary:
            for file in sorted(fetched.folder.iterdir()):
                atomic.write_new(temporary / file.name, [fetched.package.read(file.name)])
    manifest = fetched.package.manifest
    return Pulled(
        manifest.name,
        manifest.version,
        fetched.package.digest,
        fetched.signer.fingerprint,
        folder,
        fetched.notes,
    )


def _own_key(key: PathLike | None) -> bytes | None:
    if key is not None:
        return read_key(key)
    default = settings.default_key()
    default = default.with_name(default.name + ".pub")
    return read_key(default) if default.exists() else None
