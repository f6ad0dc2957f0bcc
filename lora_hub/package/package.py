"""`Package`: a published folder, read with suspicion.

Opening reads the manifest alone. Every other file goes through `read_checked`, so the
bytes that are used are the bytes whose digest was compared; `hold` reads and compares all
of them once, for who first verifies a package and then uses it. Who signed them is the
matter of `registry/verify.py`, making a package of `pack.py`.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from lora_hub import digest as digests
from lora_hub import refs
from lora_hub.errors import (
    DocumentError,
    FormatError,
    InputError,
    IntegrityError,
    ReferenceSyntaxError,
    TrustError,
)
from lora_hub.formats.detect import source_from_files
from lora_hub.formats.files import CONFIG_NAME
from lora_hub.formats.peft import WEIGHTS_NAME
from lora_hub.formats.source import AdapterSource
from lora_hub.manifest import codec
from lora_hub.manifest.document import MANIFEST_NAME, File, Manifest
from lora_hub.package import derived, layout
from lora_hub.package.targets import check_targets
from lora_hub.signing import envelope, statement
from lora_hub.signing.statement import SIGNATURE_NAME

_CHANGED = "the package was changed after packing; fetch it again, or pack the source anew"


@dataclass(frozen=True, slots=True)
class Package:
    """A package whose manifest was read and whose other files were not, yet.

    Attributes:
        manifest_bytes: as received; `digest` is theirs and names the package.
        names: all files there are, sorted, the manifest and a signature among them.
        read: file name → its bytes.
        where: what to call the package in messages.
        is_compared: whether `read` gives a listed file only with the digest that is listed:
            it was compared on the way here, and is not again.
    """

    manifest: Manifest
    manifest_bytes: bytes
    digest: str
    names: tuple[str, ...]
    read: Callable[[str], bytes]
    where: str
    is_compared: bool = False

    def entry(self, name: str) -> File:
        """Return what the manifest says about a file.

        Raises:
            IntegrityError: it does not list the file.
        """
        for file in self.manifest.files:
            if file.path == name:
                return file
        raise IntegrityError(
            "the manifest does not list the file",
            where=f"{self.where}/{name}",
            hint=_CHANGED,
        )

    def read_checked(self, name: str) -> bytes:
        """Return a listed file's bytes, which have the size and digest the manifest says.

        Raises:
            IntegrityError: they have not, or the file is missing.
        """
        entry = self.entry(name)
        where = f"{self.where}/{name}"
        if name not in self.names:
            raise IntegrityError("the file is missing", where=where, hint=_CHANGED)
        data = self.read(name)
        if len(data) != entry.size:
            raise IntegrityError(
                f"the file has {len(data)} bytes, the manifest says {entry.size}",
                where=where,
                hint=_CHANGED,
            )
        if not self.is_compared:
            digests.check(data, entry.sha256, where=where)
        return data


def open_package(folder: Path) -> Package:
    """Return the package in a folder.

    Raises:
        FormatError: there is no manifest. DocumentError: it is malformed.
        IntegrityError: something in the folder is no regular file, or the manifest is
            broken and no longer the one that was signed.
        InputError: the folder cannot be read.
    """
    if folder.is_dir() and not (folder / MANIFEST_NAME).exists():
        raise _no_package(str(folder))
    names = layout.list_files(folder)
    return read_package(layout.reader(folder), names, where=str(folder))


def read_package(
    read: Callable[[str], bytes],
    names: Collection[str],
    *,
    where: str,
    is_compared: bool = False,
) -> Package:
    """Return the package whose files `read` gives by name; errors as `open_package`.

    `is_compared` says of `read` what it says of a `Package`: a registry's blobs are so.
    """
    if MANIFEST_NAME not in names:
        raise _no_package(where)
    data = read(MANIFEST_NAME)
    try:
        manifest = codec.decode(data, where=f"{where}/{MANIFEST_NAME}")
        check_manifest(manifest, where=f"{where}/{MANIFEST_NAME}")
    except DocumentError as error:
        if SIGNATURE_NAME in names and _is_changed(data, read(SIGNATURE_NAME)):
            raise IntegrityError(
                f"the manifest was changed after signing: {error.problem}",
                where=error.where,
                hint=_CHANGED,
            ) from error
        raise
    return Package(
        manifest=manifest,
        manifest_bytes=data,
        digest=digests.of_bytes(data),
        names=tuple(sorted(names)),
        read=read,
        where=where,
        is_compared=is_compared,
    )


def hold(package: Package) -> Package:
    """Return the package with all its files in memory, each read and compared once.

    From here on the bytes that were compared are the only ones there are.

    Raises:
        IntegrityError: a listed file is missing or not as the manifest says.
    """
    files = {file.path: package.read_checked(file.path) for file in package.manifest.files}
    files[MANIFEST_NAME] = package.manifest_bytes
    if SIGNATURE_NAME in package.names:
        files[SIGNATURE_NAME] = package.read(SIGNATURE_NAME)
    return replace(package, read=files.__getitem__, is_compared=True)


def _no_package(where: str) -> FormatError:
    return FormatError(
        f"there is no {MANIFEST_NAME}: this is no package",
        where=where,
        hint="make one with `lorahub pack`",
    )


def check_manifest(manifest: Manifest, *, where: str) -> None:
    """Raise `DocumentError` where the manifest contradicts itself.

    What types cannot say: the grammar of name and version, files that can lie side by
    side, each in its role, weights and config among them, targets that are the modules.
    """
    try:
        refs.parse_name(manifest.name)
        refs.parse_version(manifest.version)
        layout.check_names([file.path for file in manifest.files], where=f"{where}#/files")
    except (ReferenceSyntaxError, FormatError) as error:
        raise DocumentError(error.problem, where=error.where, hint=error.hint) from error
    paths = [file.path for file in manifest.files]
    for index, file in enumerate(manifest.files):
        at = f"{where}#/files/{index}"
        if layout.role_of(file.path) != file.role:
            raise DocumentError(
                f"{file.path!r} is listed as {file.role}, a file of this name is "
                f"{layout.role_of(file.path) or 'no part of a package'}",
                where=at,
            )
        if file.path in paths[:index]:
            raise DocumentError(f"{file.path!r} is listed twice", where=at)
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if name not in paths:
            raise DocumentError(f"{name!r} is not listed", where=f"{where}#/files")
    check_targets(manifest, where)


def check_complete(package: Package) -> None:
    """Raise `IntegrityError` unless the listed files are there, and nothing else is.

    Compares names; `read_checked` compares bytes.
    """
    listed = {file.path for file in package.manifest.files}
    for name in sorted(listed.difference(package.names)):
        raise IntegrityError(
            "the file is missing", where=f"{package.where}/{name}", hint=_CHANGED
        )
    for name in sorted({*package.names} - listed - {MANIFEST_NAME, SIGNATURE_NAME}):
        raise IntegrityError(
            "the file was added: the manifest does not list it",
            where=f"{package.where}/{name}",
            hint=_CHANGED,
        )


def load_source(package: Package) -> AdapterSource:
    """Return the adapter in a package, from bytes whose digests were compared.

    Raises:
        IntegrityError: a file is not as the manifest says, or the modules in the weights
            are not those of the manifest. FormatError, TensorFileError: what is in the
            files cannot be applied exactly.
    """
    listed = [file.path for file in package.manifest.files]
    source = source_from_files(package.read_checked, listed, where=package.where)
    check_modules(package, source)
    return source


def check_modules(package: Package, source: AdapterSource) -> None:
    """Raise `IntegrityError` unless the manifest says of the adapter what its files say."""
    where = f"{package.where}/{MANIFEST_NAME}"
    stated = package.manifest.adapter
    modules, extra = derived.modules_of(source), derived.extra_tensors_of(source)
    if stated.modules != modules:
        raise IntegrityError(
            _difference(
                {one.module: one for one in stated.modules},
                {one.module: one for one in modules},
            ),
            where=f"{where}#/adapter/modules",
            hint=_CHANGED,
        )
    if stated.extra_tensors != extra:
        raise IntegrityError(
            _difference(
                {one.name: one for one in stated.extra_tensors},
                {one.name: one for one in extra},
            ),
            where=f"{where}#/adapter/extra_tensors",
            hint=_CHANGED,
        )
    if not modules:
        raise IntegrityError(
            "the weights hold no update of a layer", where=where, hint=_CHANGED
        )
    for field, wanted, actual in (
        ("adapter/summary", stated.summary, derived.summary_of(modules, extra)),
        (
            "adapter/alora_invocation_tokens",
            stated.alora_invocation_tokens,
            source.alora_tokens,
        ),
        ("adapter/ties_weights", stated.ties_weights, source.ties_weights),
        ("kind", package.manifest.kind, derived.kind_of(modules, extra)),
    ):
        if wanted != actual:
            raise IntegrityError(
                f"the manifest says {wanted!r}, the files say {actual!r}",
                where=f"{where}#/{field}",
                hint=_CHANGED,
            )


def _difference(stated: Mapping[str, object], found: Mapping[str, object]) -> str:
    for name in sorted(stated.keys() | found.keys()):
        if name not in found:
            return f"the manifest lists {name}, which the weights do not hold"
        if name not in stated:
            return f"the weights hold {name}, which the manifest does not list"
        if stated[name] != found[name]:
            return f"the manifest says {stated[name]}, the files say {found[name]}"
    return "the manifest lists the modules in another order, or one of them twice"


def _is_changed(manifest: bytes, bundle: bytes) -> bool:
    """Return whether a signature names other bytes; it is not verified, only believed
    where it refuses.
    """
    try:
        signed = statement.parse(envelope.parse(bundle).payload).files
    except (TrustError, InputError):
        return False
    return signed.get(MANIFEST_NAME) != digests.of_bytes(manifest)
