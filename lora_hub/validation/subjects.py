"""Which folders a path means: itself, or every package and adapter below it."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from lora_hub.formats.peft_config import CONFIG_NAME
from lora_hub.manifest.document import MANIFEST_NAME

# How far below a path adapters are looked for.
MAX_DEPTH = 12


def subjects_of(path: Path, is_registry: Callable[[Path], bool]) -> tuple[Path, ...]:
    """Return the folders to check, in order of their names.

    A file means its folder, as pre-commit names files. A folder that is no adapter, package
    or registry means those below it; where there are none, it is checked itself, and the
    finding says what is missing. Hidden folders and links are passed over.
    """
    if path.is_file():
        return (path.parent,)
    if not path.is_dir() or _is_adapter(path) or is_registry(path):
        return (path,)
    return tuple(_below(path, is_registry, MAX_DEPTH)) or (path,)


def _below(folder: Path, is_registry: Callable[[Path], bool], depth: int) -> Iterator[Path]:
    if depth == 0:
        return
    for name in sorted(_folders(folder)):
        child = folder / name
        if _is_adapter(child) or is_registry(child):
            yield child
        else:
            yield from _below(child, is_registry, depth - 1)


def _folders(folder: Path) -> Iterator[str]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False):
                yield entry.name


def _is_adapter(folder: Path) -> bool:
    return (folder / MANIFEST_NAME).exists() or (folder / CONFIG_NAME).exists()
