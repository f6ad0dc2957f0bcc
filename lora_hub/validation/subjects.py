"""Which folders a path means: itself, or every package and adapter below it."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from lora_hub.errors import InputError
from lora_hub.formats.files import CONFIG_NAME
from lora_hub.manifest.document import MANIFEST_NAME
from lora_hub.registry.documents import CONFIG

# How much is looked through below a path; a second or two.
MAX_FOLDERS = 20_000

# What package managers and interpreters put into a repository; an environment of Python is
# told by the file in it.
PASSED_OVER = frozenset({"__pycache__", "node_modules"})
ENVIRONMENT = "pyvenv.cfg"


def subjects_of(path: Path, is_registry: Callable[[Path], bool]) -> tuple[Path, ...]:
    """Return the folders to check, in order of their names.

    A file means its folder, as pre-commit names files. A folder that is no adapter, package
    or registry means those below it; where there are none, it is checked itself, and the
    finding says what is missing. Passed over are hidden folders, links, `PASSED_OVER`,
    Python's environments, and what lies in an adapter, a package or a registry.

    Raises:
        InputError: a folder cannot be read, none can have such a name, or there are more
            than `MAX_FOLDERS` of no adapter.
    """
    try:
        if path.is_file():
            return (path.parent,)
        if not path.is_dir() or _is_adapter(path) or is_registry(path):
            return (path,)
        return tuple(_below(path, is_registry)) or (path,)
    except OSError as error:
        # A folder that is passed over would be taken for one without fault.
        raise InputError(
            f"cannot be read: {error.strerror}", where=str(error.filename or path)
        ) from error


def _below(top: Path, is_registry: Callable[[Path], bool]) -> Iterator[Path]:
    waiting, count = [top], 0
    while waiting:
        folder = waiting.pop()
        with os.scandir(folder) as entries:
            found = {entry.name: entry for entry in entries}
        is_one = MANIFEST_NAME in found or CONFIG_NAME in found
        if folder is not top and (is_one or (CONFIG in found and is_registry(folder))):
            yield folder
            continue
        count += 1
        if count > MAX_FOLDERS:
            raise InputError(
                f"more than {MAX_FOLDERS} folders without an adapter are below this",
                where=str(top),
                hint="give the folders that hold adapters",
            )
        if ENVIRONMENT not in found:
            # The last comes first: in order of names, what is below a folder behind it.
            below = [name for name, entry in found.items() if _is_looked_into(entry)]
            waiting += [folder / name for name in sorted(below, reverse=True)]


def _is_looked_into(entry: os.DirEntry[str]) -> bool:
    return (
        not entry.name.startswith(".")
        and entry.name not in PASSED_OVER
        and entry.is_dir(follow_symlinks=False)
    )


def _is_adapter(folder: Path) -> bool:
    return (folder / MANIFEST_NAME).exists() or (folder / CONFIG_NAME).exists()
