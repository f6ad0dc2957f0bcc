"""What may lie in a package's folder, and reading it without being led astray.

A package is flat: regular files with plain names, each with a role of the table below.
Everything else in the folder means that somebody put it there after packing, and is
refused by name. What the files hold is the matter of `package.py`.
"""

import os
import re
import stat
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Literal

from lora_hub import refs
from lora_hub.errors import FormatError, InputError, IntegrityError
from lora_hub.formats.files import CONFIG_NAME
from lora_hub.formats.peft import WEIGHTS_NAME
from lora_hub.manifest.document import MANIFEST_NAME, MAX_MANIFEST_BYTES
from lora_hub.signing.envelope import MAX_BUNDLE_BYTES
from lora_hub.signing.policy import IGNORABLE
from lora_hub.signing.statement import SIGNATURE_NAME

Role = Literal["weights", "config", "card", "license", "tokenizer"]

CARD_NAME = "README.md"
TEMPLATE_NAME = "chat_template.jinja"
MAX_FILES = 255  # beside the manifest: a signature lists 256 files

_ROLES: dict[str, Role] = {
    CONFIG_NAME: "config",
    WEIGHTS_NAME: "weights",
    CARD_NAME: "card",
    "added_tokens.json": "tokenizer",
    TEMPLATE_NAME: "tokenizer",
    "merges.txt": "tokenizer",
    "special_tokens_map.json": "tokenizer",
    "spiece.model": "tokenizer",
    "tokenizer.json": "tokenizer",
    "tokenizer.model": "tokenizer",
    "tokenizer_config.json": "tokenizer",
    "vocab.json": "tokenizer",
    "vocab.txt": "tokenizer",
}
_LICENSE = re.compile(r"(LICEN[SC]E|NOTICE|COPYING)([._-][A-Za-z0-9._-]*)?")

# How much of each is read at all. Weights are held in memory, as the loader needs them.
_MAX_BYTES: dict[Role, int] = {
    "weights": 16 << 30,
    "config": 4 << 20,
    "card": 1 << 20,
    "license": 1 << 20,
    "tokenizer": 64 << 20,
}

LARGEST_BYTES = max(_MAX_BYTES.values())

# Ours, with no role: nothing in files[] speaks of them.
_OWN_MAX_BYTES = {MANIFEST_NAME: MAX_MANIFEST_BYTES, SIGNATURE_NAME: MAX_BUNDLE_BYTES}

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,119}")


def role_of(name: str) -> Role | None:
    """Return the role of a file of this name in a package, None if it has none."""
    if name in _ROLES:
        return _ROLES[name]
    return "license" if _LICENSE.fullmatch(name) else None


def max_bytes(name: str) -> int:
    """Return how large a file of this name may be; 0 where it has no place in a package."""
    role = role_of(name)
    return _MAX_BYTES[role] if role else _OWN_MAX_BYTES.get(name, 0)


def check_names(names: Collection[str], *, where: str) -> None:
    """Raise `FormatError` unless the names can stand together in a package, anywhere.

    ASCII alone, so that each has one spelling; no two that differ in case alone; none
    that Windows keeps for devices.
    """
    if len(names) > MAX_FILES:
        raise FormatError(
            f"{len(names)} files are listed, a package has at most {MAX_FILES}", where=where
        )
    folded: dict[str, str] = {}
    for name in names:
        if _NAME.fullmatch(name) is None or name.endswith("."):
            raise FormatError(
                f"{name!a} is no name for a file of a package",
                where=where,
                hint="letters, digits, dots, hyphens and underscores; no folders",
            )
        if name.partition(".")[0].lower() in refs.DEVICES:
            raise FormatError(f"{name!r} is a device on Windows", where=where)
        other = folded.setdefault(name.lower(), name)
        if other != name:
            raise FormatError(f"{other!r} and {name!r} differ in case alone", where=where)


def list_files(folder: Path) -> tuple[str, ...]:
    """Return the names of a package's files, sorted.

    What a signature may leave out (`.git` and the like) is passed over and never read.

    Raises:
        IntegrityError: something is no regular file: a link, a sub-folder, a pipe.
        InputError: the folder cannot be read.
    """
    names = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name in IGNORABLE and entry.name != SIGNATURE_NAME:
                    continue
                if not entry.is_file(follow_symlinks=False):
                    raise IntegrityError(
                        f"a {_kind(entry.stat(follow_symlinks=False).st_mode)} lies in the "
                        "package, which holds regular files only",
                        where=entry.path,
                        hint="it was put there after packing; fetch the package again",
                    )
                names.append(entry.name)
    except OSError as error:
        raise _unreadable(folder, error) from error
    return tuple(sorted(names))


def reader(folder: Path) -> Callable[[str], bytes]:
    """Return the function that reads a file of this package by name."""
    return lambda name: read_file(folder, name, max_bytes(name))


def read_file(folder: Path, name: str, max_bytes: int) -> bytes:
    """Return the bytes of a regular file right in the folder.

    The type is checked on the opened file, so nothing can be swapped in between.

    Raises:
        InputError: it is missing, no regular file, larger than `max_bytes`, or unreadable.
    """
    path = os.path.join(folder, name)
    # Without O_NONBLOCK, opening a named pipe would wait for its writer.
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        descriptor = os.open(path, flags)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise InputError(f"is a {_kind(status.st_mode)}", where=path)
            if status.st_size > max_bytes:
                raise InputError(
                    f"the file has {status.st_size} bytes, at most {max_bytes} are read",
                    where=path,
                )
            data = os.read(descriptor, status.st_size)
            if len(data) == status.st_size:
                return data
            # One call gives at most 2 GiB, and less where the file was cut off meanwhile.
            with os.fdopen(descriptor, "rb", closefd=False) as stream:
                return data + stream.read(status.st_size - len(data))
        finally:
            os.close(descriptor)
    except OSError as error:
        raise _unreadable(Path(path), error) from error


_KINDS = (
    (stat.S_ISLNK, "symbolic link"),
    (stat.S_ISDIR, "folder"),
    (stat.S_ISFIFO, "named pipe"),
    (stat.S_ISSOCK, "socket"),
)


def _kind(mode: int) -> str:
    return next((kind for is_kind, kind in _KINDS if is_kind(mode)), "device")


def _unreadable(path: Path, error: OSError) -> InputError:
    return InputError(f"cannot be read: {error.strerror or error}", where=str(path))
