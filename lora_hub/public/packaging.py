"""The packaging half as users call it: paths and names in, plain values out. No torch.

Each function is what one command does; `cli/` prints what these return.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_hub import atomic, refs, settings
from lora_hub.errors import InputError, StoreError, TrustError

if TYPE_CHECKING:
    from lora_hub.manifest.document import BaseHint
    from lora_hub.package.pack import PackPlan
    from lora_hub.package.package import Package
    from lora_hub.registry.publish import PushResult
    from lora_hub.registry.registry import Registry
    from lora_hub.registry.trust import Pin
    from lora_hub.validation.findings import Finding

PathLike = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class KeyPair:
    """Two files and what people call the key."""

    private: Path
    public: Path
    fingerprint: str


@dataclass(frozen=True, slots=True)
class BaseFingerprint:
    """Which base a folder holds; `tensors` is name → digest, filled when asked for."""

    root: str
    struct: str
    count: int
    size_bytes: int
    tensors: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Signed:
    """A package and the key that signed it.

    Attributes:
        package: the package digest.
        fingerprint: of the key.
        files: name → digest of every file the signature covers.
    """

    package: str
    fingerprint: str
    files: Mapping[str, str]


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


@dataclass(frozen=True, slots=True)
class Pinned:
    """A namespace, the keys believed for it, and where they were first met."""

    namespace: str
    fingerprints: tuple[str, ...]
    registry: str
    pinned: str


def keygen(out: PathLike) -> KeyPair:
    """Make a P-256 key pair: `out` (private, mode 0600) and `out`.pub.

    Raises:
        StoreError: one of the files exists; keys are never overwritten.
    """
    from lora_hub.signing import keys

    private = Path(out)
    public = private.with_name(private.name + ".pub")
    pem = keys.generate()
    key = keys.private_key(pem)
    for path, data, mode in (
        (public, keys.public_pem(key), 0o644),
        (private, pem, 0o600),
    ):
        if private.exists() or not atomic.write_new(path, [data], mode=mode):
            raise StoreError(
                "exists already, and a key is never overwritten",
                where=str(private if private.exists() else path),
                hint="name another file with --out",
            )
    return KeyPair(private, public, keys.fingerprint(key))


def fingerprint(base: PathLike, *, tensors: bool = False) -> BaseFingerprint:
    """Return which base a checkpoint folder holds.

    Raises:
        InputError: the folder is no checkpoint of safetensors files.
    """
    from lora_hub.base.folder import FolderBase
    from lora_hub.base.view import root_of, struct_of

    with FolderBase.open(Path(base), settings.cache_folder() / "bases") as view:
        root = root_of(view)
        assert root is not None  # None is for tensors asked in another dtype
        names = sorted(view.tensors) if tensors else ()
        return BaseFingerprint(
            root=root,
            struct=struct_of(view),
            count=len(view.tensors),
            size_bytes=sum(info.size_bytes for info in view.checkpoint.tensors.values()),
            tensors={name: view.digest(name) or "" for name in names},
        )


def plan(
    src: PathLike,
    *,
    name: str,
    version: str,
    base: PathLike,
    task: str,
    license: str,  # noqa: A002 - the manifest's word
    summary: str = "",
    authors: Sequence[str] = (),
    languages: Sequence[str] = (),
    hints: Sequence[str] = (),
    base_license: str | None = None,
    extra: Mapping[str, Any] | None = None,
) -> "PackPlan":
    """Return the package that `pack` would write; see there."""
    from lora_hub.manifest.document import Author
    from lora_hub.package.pack import plan_package

    return plan_package(
        Path(src),
        name=name,
        version=version,
        base=Path(base),
        task=task,
        license=license,
        summary=summary,
        authors=[Author(name=author) for author in authors],
        languages=languages,
        hints=[_hint(text) for text in hints],
        base_license=base_license,
        extra=extra,
        digest_cache=settings.cache_folder() / "bases",
    )


def pack(src: PathLike, *, out: PathLike, **fields: Any) -> "Package":
    """Make the package folder `out` from an adapter folder and its base.

    Args:
        src: a folder as PEFT saves it.
        out: a folder that does not exist yet.
        **fields: name, version, base, task and license, which every package has; summary,
            authors, languages, hints ("hub:name[@revision]"), base_license and extra
            (further fields of the manifest), which it may have. See `plan_package`.

    Raises:
        InputError: something in the folder or the fields cannot be packed; the message
            names it.
        FitError: the adapter was not made for this base.
        StoreError: `out` is taken or cannot be written.
    """
    from lora_hub.package.pack import write_package

    return write_package(plan(src, **fields), Path(out))


def sign(package: PathLike, key: PathLike) -> Signed:
    """Write `model.sig` into the package folder: a signature over every file of it.

    Args:
        package: a package folder.
        key: the file of a private key, as `keygen` makes it.

    Raises:
        IntegrityError: the folder is not what its manifest says; nothing is signed.
        InputError: the key cannot be read.
    """
    from lora_hub.package.package import check_complete, open_package
    from lora_hub.registry.verify import digests_of
    from lora_hub.signing import keys
    from lora_hub.signing.sign import sign as sign_files
    from lora_hub.signing.statement import SIGNATURE_NAME

    folder = Path(package)
    opened = open_package(folder)
    check_complete(opened)
    private = keys.private_key(_read_key(key), where=str(key))
    files = digests_of(opened)
    bundle = sign_files(files, subject=opened.manifest.name.partition("/")[2], key=private)
    atomic.replace(folder / SIGNATURE_NAME, [bundle])
    return Signed(opened.digest, keys.fingerprint(private), files)


def verify(package: PathLike, key: PathLike | None = None) -> Signed:
    """Check the signature of a package folder and every byte it covers.

    Args:
        package: a package folder.
        key: the file of the public key to trust; without it the keys pinned for the
            package's namespace decide.

    Raises:
        TrustError: not signed, signed by another key, or no key is trusted.
        IntegrityError: a file was changed, added or removed after signing.
    """
    from lora_hub.package.package import open_package
    from lora_hub.registry.verify import digests_of, verify_package

    opened = open_package(Path(package))
    keys = [_read_key(key)] if key else _pinned(opened.manifest.name)
    signer = verify_package(opened, keys)
    return Signed(opened.digest, signer.fingerprint, digests_of(opened))


def validate(*paths: PathLike) -> "tuple[Finding, ...]":
    """Return what is wrong with packages, adapter folders and registries; nothing is raised
    for what is found.

    Raises:
        InputError: a path does not exist.
    """
    from lora_hub.validation.run import validate as run

    return tuple(finding for path in paths for finding in run(Path(path)))


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
    reference: str,
    reason: str,
    key: PathLike,
    *,
    registry: PathLike | None = None,
    undo: bool = False,
) -> bool:
    """Withdraw a version, or bring it back; return whether that changed anything.

    Args:
        reference: `namespace/name@version`, an exact version.
        reason: what users are told.
        key: the file of a private key of the namespace.
        registry: a folder or a configured name.
        undo: bring it back.

    Raises:
        NotFoundError: there is no such version.
        TrustError: the key does not sign for the namespace.
    """
    from lora_hub.public.find import open_registry
    from lora_hub.registry import publish
    from lora_hub.signing import keys

    parsed = refs.parse(reference)
    refs.parse_version(parsed.selector)
    opened = open_registry(parsed.registry or registry)
    private = keys.private_key(_read_key(key), where=str(key))
    if undo:
        return publish.unyank(opened, parsed.full_name, parsed.selector, private)
    return publish.yank(opened, parsed.full_name, parsed.selector, reason, private)


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


def pins() -> tuple[Pinned, ...]:
    """Return every namespace whose keys are pinned."""
    from lora_hub.registry.trust import TrustStore

    return tuple(_shown(pin) for pin in TrustStore().list())


def is_pinned(namespace: str) -> bool:
    from lora_hub.registry.trust import TrustStore

    return TrustStore().get(namespace) is not None


def trust(namespace: str, keys: Sequence[PathLike], *, replace: bool = False) -> Pinned:
    """Pin public keys (files) for a namespace, or `replace` those pinned.

    Raises:
        TrustError: it is pinned to other keys and nothing is to be replaced.
        NotFoundError: it is not pinned and something is to be replaced.
    """
    from lora_hub.registry.trust import TrustStore

    store = TrustStore()
    pems = [_read_key(key) for key in keys]
    return _shown((store.rotate if replace else store.add)(namespace, pems))


def forget(namespace: str) -> None:
    """Remove the pin of a namespace."""
    from lora_hub.registry.trust import TrustStore

    TrustStore().remove(namespace)


def rotate(
    namespace: str,
    keys: Sequence[PathLike],
    key: PathLike,
    *,
    registry: PathLike | None = None,
) -> None:
    """Publish that these public keys, and no others, sign for a namespace from now on.

    Raises:
        TrustError: `key` (a private key's file) does not sign for the namespace now.
    """
    from lora_hub.public.find import open_registry
    from lora_hub.registry import publish
    from lora_hub.signing.keys import private_key

    private = private_key(_read_key(key), where=str(key))
    publish.rotate(
        open_registry(registry), namespace, [_read_key(each) for each in keys], private
    )


def _shown(pin: "Pin") -> Pinned:
    from lora_hub.signing import keys

    return Pinned(
        pin.namespace,
        tuple(keys.fingerprint(keys.public_key(pem)) for pem in pin.public_keys),
        pin.registry,
        pin.pinned,
    )


def _hint(text: str) -> "BaseHint":
    from lora_hub.manifest.document import BaseHint

    hub, colon, name = text.partition(":")
    repo, _, revision = name.partition("@")
    if not (colon and hub and repo):
        raise InputError(
            "a hint where the base is found is HUB:NAME[@REVISION]",
            where=repr(text),
            hint="for example hf:HuggingFaceTB/SmolLM2-135M-Instruct@<commit>",
        )
    return BaseHint(hub=hub, repo=repo, revision=revision or None)


def _read_key(path: PathLike) -> bytes:
    try:
        with Path(path).open("rb") as stream:
            return stream.read(1 << 16)
    except OSError as error:
        raise InputError(
            f"the key cannot be read: {error.strerror}",
            where=os.fspath(path),
            hint="make a pair with `lorahub keygen`",
        ) from error


def _own_key(key: PathLike | None) -> bytes | None:
    if key is not None:
        return _read_key(key)
    default = settings.default_key()
    default = default.with_name(default.name + ".pub")
    return _read_key(default) if default.exists() else None


def _pinned(full_name: str) -> Sequence[bytes]:
    from lora_hub.registry.trust import TrustStore

    namespace = full_name.partition("/")[0]
    pin = TrustStore().get(namespace)
    if pin is None:
        raise TrustError(
            f"no key is trusted for the namespace {namespace!r}",
            where=full_name,
            hint=f"give --key FILE.pub, or `lorahub trust add {namespace} FILE.pub`",
        )
    return pin.public_keys
