"""Findings about one package: manifest, files, adapter, signature.

In two halves: `begin` reads what is small, `finish` the rest. Who checks many packages
begins some of them before finishing any: weights fill the processor's caches, and what is
small takes half the time where they do not come in between.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from lora_hub import digest
from lora_hub.errors import IntegrityError, LoraHubError, TensorFileError, TrustError
from lora_hub.formats.detect import source_from_files
from lora_hub.formats.files import CONFIG_NAME
from lora_hub.formats.source import AdapterSource
from lora_hub.manifest.document import MANIFEST_NAME
from lora_hub.package.layout import CARD_NAME
from lora_hub.package.package import Package, check_modules
from lora_hub.recent import RecentOfSame
from lora_hub.registry.verify import check_signature
from lora_hub.signing import envelope, policy, statement
from lora_hub.signing.statement import SIGNATURE_NAME
from lora_hub.validation.base_name import is_local
from lora_hub.validation.code import CODE_NAME, check_code
from lora_hub.validation.findings import Finding, finding, from_error
from lora_hub.validation.manifest import check_bytes
from lora_hub.validation.metadata import check_header
from lora_hub.validation.texts import check_text
from lora_hub.validation.weights import check_numbers


@dataclass(frozen=True, slots=True)
class Begun:
    """A package of which manifest and signature were checked, and nothing else.

    Attributes:
        package: None where the manifest cannot be used: what it says about the other files
            cannot be relied on.
    """

    package: Package | None
    about_manifest: Sequence[Finding]
    about_signature: Sequence[Finding] = ()


def check_package(
    read: Callable[[str], bytes],
    names: Collection[str],
    keys_of: Callable[[str], Sequence[bytes]],
    *,
    where: str,
) -> list[Finding]:
    """Return the findings about a package; arguments as `begin`."""
    return finish(begin(read, names, keys_of, where=where))


def begin(
    read: Callable[[str], bytes],
    names: Collection[str],
    keys_of: Callable[[str], Sequence[bytes]],
    *,
    where: str,
) -> Begun:
    """Return what manifest and signature say of a package whose files `read` gives.

    Args:
        read: file name → its bytes, unchecked.
        names: of all files there are.
        keys_of: namespace → public keys that may sign there, none where they are not known.
        where: what to call it.
    """
    at = f"{where}/{MANIFEST_NAME}"
    try:
        data = read(MANIFEST_NAME)
    except LoraHubError as error:
        return Begun(None, [from_error("LH001", error, at)])
    manifest, found = check_bytes(data, at)
    if manifest is None:
        return Begun(None, found)
    package = Package(
        manifest=manifest,
        manifest_bytes=data,
        digest=digest.of_bytes(data),
        names=tuple(sorted(names)),
        read=read,
        where=where,
    )
    keys = keys_of(manifest.name.partition("/")[0])
    return Begun(package, found, _check_signature(package, keys))


def finish(begun: Begun) -> list[Finding]:
    """Return all findings about a package, those of `begin` among them."""
    found = list(begun.about_manifest)
    if begun.package is not None:
        contents, about_files = _check_files(begun.package)
        found += about_files
        if contents is not None:
            found += _check_adapter(begun.package, contents)
    return [*found, *begun.about_signature]


def _check_files(package: Package) -> tuple[Mapping[str, bytes] | None, list[Finding]]:
    """Return the bytes of all listed files, None unless all are as listed; the findings."""
    contents = {}
    found = []
    for file in package.manifest.files:
        at = f"{package.where}/{file.path}"
        try:
            contents[file.path] = package.read_checked(file.path)
        except IntegrityError as error:
            rule = "LH010" if file.path in package.names else "LH011"
            found.append(from_error(rule, error, at))
        except LoraHubError as error:
            found.append(from_error("LH010", error, at))
    intact = not found
    listed = {file.path for file in package.manifest.files}
    found += [
        finding("LH012", f"{package.where}/{name}", "the manifest does not list it")
        for name in sorted({*package.names} - listed - {MANIFEST_NAME, SIGNATURE_NAME})
    ]
    return contents if intact else None, found


def _check_adapter(package: Package, contents: Mapping[str, bytes]) -> list[Finding]:
    """Return the findings about the adapter in these bytes: those that were compared."""
    where = package.where
    card = contents.get(CARD_NAME, b"").decode(errors="ignore")
    about_card = check_text(card, f"{where}/{CARD_NAME}")
    if CODE_NAME in contents:
        about_card += check_code(contents[CODE_NAME], f"{where}/{CODE_NAME}")
    source, found = try_source(
        lambda: source_from_files(contents.__getitem__, contents, where=where), where
    )
    if source is None:
        return about_card + found
    return [*about_card, *found, *_check_names(package, source), *check_numbers(source)]


# Names, shapes and settings of an adapter, and a manifest that says the same of them.
_IN_ORDER: RecentOfSame[tuple[object, ...]] = RecentOfSame()


def _check_names(package: Package, source: AdapterSource) -> list[Finding]:
    """Return the findings about an adapter's header, config and manifest."""
    where = package.where
    parts = (
        package.manifest.adapter,
        source.tensors.header,
        source.updates,
        source.replacements,
    )
    settings = (
        package.manifest.kind,
        source.base_name,
        source.alora_tokens,
        source.ties_weights,
    )
    if _IN_ORDER.get(*parts) == settings:
        return []
    found = []
    try:
        check_modules(package, source)
    except IntegrityError as error:
        found.append(from_error("LH022", error, where))
    if source.base_name is not None and is_local(source.base_name):
        found.append(
            finding(
                "LH024",
                f"{where}/{CONFIG_NAME}",
                "the base is named by a local path",
                "it tells strangers about its author's machine: pack the source again",
            )
        )
    found += check_header(source.tensors)
    if not found:
        _IN_ORDER.keep(*parts, result=settings)
    return found


def _check_signature(package: Package, keys: Sequence[bytes]) -> list[Finding]:
    at = f"{package.where}/{SIGNATURE_NAME}"
    if SIGNATURE_NAME not in package.names:
        return [finding("LH040", package.where, f"there is no {SIGNATURE_NAME}")]
    try:
        signed = statement.parse(
            envelope.parse(package.read(SIGNATURE_NAME), where=at).payload, where=at
        )
        policy.check(signed, {*package.names} - {SIGNATURE_NAME}, where=at)
    except LoraHubError as error:
        return [from_error("LH041", error, at)]
    if not keys:
        return [*_compare(package, signed), finding("LH043", at, "no key is known for it")]
    try:
        check_signature(package, keys)
    except (TrustError, IntegrityError) as error:
        return [from_error("LH042", error, at)]
    return []


def _compare(package: Package, signed: statement.Statement) -> list[Finding]:
    """Return what was signed in other words than the manifest says; no key is needed."""
    stated = {file.path: file.sha256 for file in package.manifest.files}
    stated[MANIFEST_NAME] = package.digest
    return [
        finding(
            "LH042", f"{package.where}/{name}", "the file is not the one that was signed"
        )
        for name in sorted(stated.keys() | signed.files.keys())
        if stated.get(name) != signed.files.get(name)
    ]


def try_source(
    make: Callable[[], AdapterSource], where: str
) -> tuple[AdapterSource | None, list[Finding]]:
    """Return what `make` gives, else why it cannot be read."""
    try:
        return make(), []
    except TensorFileError as error:
        return None, [from_error("LH020", error, where)]
    except LoraHubError as error:
        return None, [from_error("LH021", error, where)]
