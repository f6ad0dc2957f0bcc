"""Findings about what lies in an adapter's folder beside and below the adapter."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from lora_hub.formats.detect import PICKLES
from lora_hub.validation.findings import Finding, finding
from lora_hub.validation.texts import check_text

# A folder of more entries than this is not looked through to its end.
MAX_ENTRIES = 10_000

_POINTER = b"version https://git-lfs.github.com/spec/"
_SIZE = re.compile(rb"^size (\d{1,20})$", re.MULTILINE)
_PICKLED = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
# safetensors begin with a length: 640 bytes of header look like a pickle's first two.
_NO_PICKLES = (".safetensors", ".gguf")
_CARD = "README.md"
_CARD_BYTES = 1 << 20


def check_surroundings(folder: Path) -> list[Finding]:
    """Return the findings about the card, and pickles and LFS pointers wherever they lie.

    Reads the first bytes of every file; links are not followed.
    """
    found = []
    for path in _files(folder):
        where = f"{folder}/{path.relative_to(folder).as_posix()}"
        head = _head(path, 1024)
        if head.startswith(_POINTER):
            size = _SIZE.search(head)
            of = f" of {int(size[1]):,} bytes" if size else ""
            found.append(
                finding("LH013", where, f"this is a Git LFS pointer to a file{of}")
            )
        elif path.name.lower().endswith(PICKLES) or (
            head.startswith(_PICKLED) and not path.name.lower().endswith(_NO_PICKLES)
        ):
            found.append(finding("LH023", where, "this is a pickle"))
    if (folder / _CARD).is_file():
        text = _head(folder / _CARD, _CARD_BYTES).decode(errors="ignore")
        found += check_text(text, f"{folder}/{_CARD}")
    return found


def _files(folder: Path) -> Iterator[Path]:
    """Give the regular files in order of their paths, those in `.git` and the like not."""
    count = 0
    for at, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            count += 1
            if count > MAX_ENTRIES:
                return
            path = Path(at, name)
            # A named pipe would wait for its writer.
            if path.is_file():
                yield path


def _head(path: Path, size_bytes: int) -> bytes:
    try:
        with path.open("rb") as stream:
            return stream.read(size_bytes)
    except OSError:
        return b""  # who needs the file says so
