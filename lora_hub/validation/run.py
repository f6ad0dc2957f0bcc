"""A path → everything that is wrong there. Nothing found is raised.

What the path is decides which checks run: a package, an adapter's bare folder, or a
registry, whose every published version is then checked as a package.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_hub import links, strict_json
from lora_hub.errors import DocumentError, InputError, LoraHubError
from lora_hub.formats.detect import open_adapter
from lora_hub.formats.dialect import ReadOptions
from lora_hub.formats.files import CONFIG_NAME, MAX_HEADERS_BYTES, WEIGHTS
from lora_hub.formats.peft import WEIGHTS_NAME
from lora_hub.manifest.document import MANIFEST_NAME
from lora_hub.package import layout
from lora_hub.registry.documents import CONFIG
from lora_hub.registry.trust import TrustStore
from lora_hub.tensors.file import TensorFile
from lora_hub.tensors.header import ADAPTER_LIMITS
from lora_hub.validation.base_name import check_base
from lora_hub.validation.findings import Checked, Finding, fewer, finding, from_error
from lora_hub.validation.metadata import check_header
from lora_hub.validation.missing_parts import check_missing_parts
from lora_hub.validation.package import begin, check_package, finish, try_source
from lora_hub.validation.sharing import chunks, shared
from lora_hub.validation.subjects import subjects_of
from lora_hub.validation.surroundings import check_surroundings
from lora_hub.validation.texts import check_texts
from lora_hub.validation.weights import check_numbers

if TYPE_CHECKING:
    from lora_hub.registry.registry import Registry

# Below this, checking small adapters takes less time than starting processes does.
MANY = 64


def validate(
    path: Path, options: ReadOptions | None = None, dialect: str | None = None
) -> tuple[Finding, ...]:
    """Return what is wrong with a package, an adapter's folder or a registry.

    Args:
        path: the folder.
        options: what no file of a bare adapter says.
        dialect: what a bare adapter is, where two could be meant.

    Raises:
        InputError: there is no such folder.
    """
    return _finish(path, _begin(path, options, dialect, _pinned_keys))


def check_all(
    paths: Sequence[Path],
    *,
    processes: int = 1,
    options: ReadOptions | None = None,
    dialect: str | None = None,
) -> tuple[Checked, ...]:
    """Return what is wrong with everything at and below the paths, in their order.

    Args:
        paths: each may be a folder of adapters, packages and registries, or a file in one.
        processes: how many share the work where it is much; see `sharing.py`.
        options: what no file of a bare adapter says.
        dialect: what bare adapters are, where two could be meant.

    Raises:
        InputError: a path does not exist.
    """
    folders = subjects(paths)
    check = functools.partial(_validate_some, options=options, dialect=dialect)
    if processes > 1 and len(folders) >= MANY:
        found = shared(check, folders, processes)
    else:
        found = [one for some in chunks(folders) for one in check(some)]
    return tuple(map(Checked, map(str, folders), found))


def subjects(paths: Sequence[Path]) -> tuple[Path, ...]:
    """Return the folders that the paths mean, each once; see `subjects.py`."""
    return tuple(
        dict.fromkeys(
            folder for path in paths for folder in subjects_of(path, _is_registry)
        )
    )


# What is left of a check that has begun.
_Rest = Callable[[], Sequence[Finding]]
_KeysOf = Callable[[str], tuple[bytes, ...]]


def _validate_some(
    paths: Sequence[Path], options: ReadOptions | None, dialect: str | None
) -> list[tuple[Finding, ...]]:
    """Return what `validate` does for each path; all are begun before any is finished."""
    # A pin is looked up once for all of them.
    keys_of = functools.cache(_pinned_keys)
    begun = [_begin(path, options, dialect, keys_of) for path in paths]
    return [_finish(path, rest) for path, rest in zip(paths, begun, strict=True)]


def _begin(
    path: Path, options: ReadOptions | None, dialect: str | None, keys_of: _KeysOf
) -> _Rest:
    """Begin the check of a folder and return the rest of it; errors as `validate`."""
    try:
        if (path / MANIFEST_NAME).exists():
            return _begin_package(path, keys_of)
        if _is_registry(path):
            return lambda: _check_registry(path)
    except OSError as error:
        found = _unreadable(path, error)
        return lambda: found
    if not path.is_dir():
        raise InputError(
            "is no folder" if path.exists() else "there is no such folder",
            where=str(path),
            hint="give the folder of a package, an adapter or a registry",
        )
    return lambda: fewer(_check_adapter(path, options, dialect), str(path))


def _finish(path: Path, rest: _Rest) -> tuple[Finding, ...]:
    try:
        return tuple(rest())
    except OSError as error:  # of one folder, which says nothing of the others
        return _unreadable(path, error)


def _unreadable(path: Path, error: OSError) -> tuple[Finding, ...]:
    at = str(error.filename or path)
    return (finding("LH021", at, f"cannot be read: {error.strerror}"),)


def _begin_package(folder: Path, keys_of: _KeysOf) -> _Rest:
    where = str(folder)
    try:
        names = layout.list_files(folder)
    except LoraHubError as error:
        found = [from_error("LH012", error, where)]
        return lambda: found
    begun = begin(layout.reader(folder), names, keys_of, where=where)
    return lambda: fewer(finish(begun), where)


def _pinned_keys(namespace: str) -> tuple[bytes, ...]:
    """Return the keys that the user's trust store pins for a namespace."""
    # What is wrong with the store is said by the commands that rely on it.
    with contextlib.suppress(LoraHubError):
        pin = TrustStore().get(namespace)
        return pin.public_keys if pin else ()
    return ()


def _check_adapter(
    folder: Path, options: ReadOptions | None, dialect: str | None
) -> list[Finding]:
    where = str(folder)
    found = check_surroundings(folder)
    if any(map(_lies_elsewhere, folder.iterdir())):
        return found  # nothing is read through a link
    pointers = {one.where for one in found if one.rule == "LH013"}
    found += _check_headers(folder)
    config = _config_of(folder)
    found += check_texts(config, f"{where}/{CONFIG_NAME}")
    if any(name.endswith((CONFIG_NAME, ".safetensors")) for name in pointers):
        return found  # there is nothing to read yet
    source, why_not = try_source(
        lambda: open_adapter(folder, options, dialect=dialect), where
    )
    if source is not None:
        found += check_numbers(source)
        found += check_missing_parts(config, source, f"{where}/{CONFIG_NAME}")
        found += _check_name(folder, config)
    if "peft_type" in config or source is not None:
        at = f"{where}/{CONFIG_NAME}" if config else where
        found += check_base(
            source.base_name if source else config.get("base_model_name_or_path"),
            source.base_revision if source else config.get("revision"),
            at,
        )
    return [*why_not, *found]


def _check_name(folder: Path, config: Mapping[str, Any]) -> Iterator[Finding]:
    """Give a finding where PEFT would not find the weights that were read."""
    if "peft_type" in config and not (folder / WEIGHTS_NAME).exists():
        yield finding(
            "LH067", str(folder), f"there is no {WEIGHTS_NAME}; another file was read"
        )


def _check_headers(folder: Path) -> list[Finding]:
    """Return the findings about the headers of all files of weights in the folder."""
    found: list[Finding] = []
    left = MAX_HEADERS_BYTES
    paths = folder.glob("*.safetensors")
    # The adapter's own first, so that a flood of others cannot hide it.
    for path in sorted(paths, key=lambda path: (path.name != WEIGHTS_NAME, path.name)):
        if left < 0:
            found.append(
                finding(
                    "LH028",
                    str(path),
                    "the headers before this have more than 8 MiB: from here on none is "
                    "looked at",
                    "give each adapter a folder of its own",
                )
            )
            break
        try:
            with TensorFile.open(path, limits=ADAPTER_LIMITS) as file:
                left -= file.header.data_start
                found += check_header(file)
        except LoraHubError:
            # What is wrong with it is said where the adapter is read.
            left -= ADAPTER_LIMITS.header_bytes
    return found


def _lies_elsewhere(path: Path) -> bool:
    """Return whether this is a config or weights that a link brings in from outside."""
    is_read = path.name == CONFIG_NAME or path.name.lower().endswith(WEIGHTS)
    return is_read and path.is_symlink() and links.leads_out(path, path.parent)


def _config_of(folder: Path) -> dict[str, Any]:
    """Return the config, empty where there is none or it cannot be read."""
    with contextlib.suppress(LoraHubError):
        return strict_json.read_object(folder / CONFIG_NAME)
    return {}


def _check_registry(folder: Path) -> list[Finding]:
    from lora_hub.registry.check import check as check_whole
    from lora_hub.registry.registry import open_registry

    registry = open_registry(folder)
    problems = check_whole(registry)
    found = fewer(
        (finding("LH050", one.where, one.message, one.hint) for one in problems),
        str(folder),
    )
    for name in registry.names():
        # What stops us here, the check of the whole registry has said.
        with contextlib.suppress(LoraHubError):
            found += _check_versions(registry, name)
    return found


def _check_versions(registry: "Registry", name: str) -> list[Finding]:
    from lora_hub.registry.fetch import open_published
    from lora_hub.registry.resolve import resolved

    found = []
    for entry in registry.versions(name):
        # As in `registry.check`: a withdrawn version may outlive the belief in its key.
        keys_of = registry.all_keys if entry.yanked else registry.keys
        with contextlib.suppress(LoraHubError):
            package = open_published(resolved(entry), registry)
            found += fewer(
                check_package(package.read, package.names, keys_of, where=package.where),
                package.where,
            )
    return found


def _is_registry(folder: Path) -> bool:
    try:
        config = strict_json.read_object(folder / CONFIG)
    except DocumentError:
        return False
    return str(config.get("schema", "")).startswith("lorahub.registry/")
