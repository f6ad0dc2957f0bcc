"""Findings about what lies in an adapter's folder beside and below the adapter.

Links that lead out of the folder are told (LH080) and never followed.
"""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from lora_hub import links
from lora_hub.formats.files import CONFIG_NAME, WEIGHTS
from lora_hub.formats.peft import WEIGHTS_NAME
from lora_hub.package import layout
from lora_hub.tensors.foreign import PICKLE_HEADS, PICKLE_SUFFIXES
from lora_hub.validation.code import CODE_NAME, MAX_BYTES, check_code
from lora_hub.validation.findings import Finding, finding
from lora_hub.validation.texts import check_text

# A folder of more entries than this is not looked through to its end.
MAX_ENTRIES = 10_000

_POINTER = b"version https://git-lfs.github.com/spec/"
_SIZE = re.compile(rb"^size (\d{1,20})$", re.MULTILINE)

_OWN = frozenset({CONFIG_NAME, WEIGHTS_NAME})

# Files whose text is looked through: name, how much of it is read, the check.
_TEXTS: tuple[tuple[str, int, Callable[[bytes, str], list[Finding]]], ...] = (
    (
        "README.md",
        1 << 20,
        lambda data, where: check_text(data.decode(errors="ignore"), where),
    ),
    (CODE_NAME, MAX_BYTES + 1, check_code),
)


def check_surroundings(folder: Path) -> list[Finding]:
    """Return the findings about the card, code that a tokenizer names, and links out of
    the folder, pickles and LFS pointers wherever they lie.

    Reads the first bytes of every file.
    """
    found = []
    for count, path in enumerate(_files(folder)):
        where = f"{folder}/{path.relative_to(folder).as_posix()}"
        if count == MAX_ENTRIES:
            message = f"more than {MAX_ENTRIES} files: from here on none is looked at"
            found.append(finding("LH023", where, message, "keep the adapter by itself"))
            break
        if path.is_symlink() and links.leads_out(path, folder):
            if path.parent == folder and _is_read(path.name):
                found.append(
                    finding("LH080", where, "this is a link that leads out of the folder")
                )
            continue
        # A named pipe would wait for its writer.
        if not path.is_file():
            continue
        head = _head(path, 1024)
        if head.startswith(_POINTER):
            size = _SIZE.search(head)
            of = f" of {int(size[1]):,} bytes" if size else ""
            found.append(
                finding("LH013", where, f"this is a Git LFS pointer to a file{of}")
            )
        # Safetensors begin with a length: 640 bytes of header look like a pickle's head.
        elif path.name.lower().endswith(PICKLE_SUFFIXES) or (
            head.startswith(PICKLE_HEADS) and not path.name.lower().endswith(WEIGHTS)
        ):
            found.append(finding("LH023", where, "this is a pickle"))
    pointers = {one.where for one in found if one.rule == "LH013"}
    for name, size_bytes, check in _TEXTS:
        path, where = folder / name, f"{folder}/{name}"
        is_there = path.is_file() and not links.leads_out(path, folder)
        if is_there and where not in pointers:
            found += check(_head(path, size_bytes), where)
    return found


def _is_read(name: str) -> bool:
    """Return whether a file of this name, right in the folder, is an adapter's."""
    return layout.role_of(name) is not None or name.lower().endswith(WEIGHTS)


def _files(folder: Path) -> Iterator[Path]:
    """Give the files and links in order of their paths, those in `.git` and the like not.

    The adapter's own come first, so that a flood of others cannot hide them.
    """
    count = 0
    for at, folders, names in os.walk(folder):
        linked = [name for name in folders if os.path.islink(os.path.join(at, name))]
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted([*names, *linked], key=lambda name: (name not in _OWN, name)):
            count += 1
            yield Path(at, name)
            if count > MAX_ENTRIES:
                return


def _head(path: Path, size_bytes: int) -> bytes:
    try:
        with path.open("rb") as stream:
            return stream.read(size_bytes)
    except OSError:
        return b""  # who needs the file says so
