"""The files of an adapter's folder, or one file of weights and the config beside it.

Looking does not read the weights: a folder may turn out to hold a whole model. A file is
read whole only if it is no larger than a package's may be, and a safetensors file only if
its header is true: a file that claims 60 GB costs a few bytes.
"""

import os
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_hub import strict_json
from lora_hub.errors import InputError
from lora_hub.formats.dialect import Glance
from lora_hub.tensors.file import TensorFile
from lora_hub.tensors.header import ADAPTER_LIMITS

CONFIG_NAME = "adapter_config.json"
WEIGHTS = (".safetensors", ".gguf")

# The largest file of weights that is read: as in a package (`package/layout.py`).
MAX_WEIGHTS_BYTES = 16 << 30
# The largest config; the JSON reader has a limit of its own below this.
_MAX_CONFIG_BYTES = 16 << 20

# What is read of the headers of all files of weights in one folder: those of a hundred
# adapters, as people keep them side by side.
MAX_HEADERS_BYTES = 8 << 20

# How deep adapters are looked for, to name them in a hint.
_MAX_FOLDERS = 200

_MAGIC_BYTES = 4
_SMALL_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Files:
    """What can be asked of an adapter's files.

    Attributes:
        where: what to call the folder in messages.
        read: file name → its bytes.
        glance: file name → what its header says.
        chosen: the file of weights that the caller named, if one.
        inner: folders in this one that hold an adapter_config.json, by name.
    """

    where: str
    names: frozenset[str]
    read: Callable[[str], bytes]
    glance: Callable[[str], Glance]
    chosen: str | None = None
    inner: tuple[str, ...] = ()

    def config(self) -> dict[str, Any] | None:
        """Return the object in adapter_config.json, None where there is no such file."""
        if CONFIG_NAME not in self.names:
            return None
        return strict_json.decode_object(
            self.read(CONFIG_NAME), where=f"{self.where}/{CONFIG_NAME}"
        )


def open_files(path: Path) -> Files:
    """Return the files of a folder, or of a file of weights in one.

    Raises:
        InputError: there is no such folder, or it cannot be read.
    """
    where = str(path)
    chosen = None
    folder = path
    # `os.path` answers no where it may not look; listing the folder then tells why.
    if path.name.lower().endswith(WEIGHTS) and os.path.isfile(path):
        folder, chosen = path.parent, path.name
    try:
        names = frozenset(os.listdir(folder))
    except FileNotFoundError as error:
        raise InputError("there is no such folder", where=where) from error
    except NotADirectoryError as error:
        raise InputError(
            "this is a file, expected an adapter's folder", where=where
        ) from error
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=where) from error
    return Files(
        where=str(folder),
        names=names & {CONFIG_NAME, chosen} if chosen else names,
        read=lambda name: _read(folder / name),
        glance=lambda name: _glance(folder / name),
        chosen=chosen,
        inner=() if chosen or CONFIG_NAME in names else _inner(folder, names),
    )


def _inner(folder: Path, names: Iterable[str]) -> tuple[str, ...]:
    """Return the folders in this one that look like an adapter's."""
    some = sorted(names)[:_MAX_FOLDERS]
    return tuple(name for name in some if os.path.isfile(folder / name / CONFIG_NAME))


def _glance(path: Path) -> Glance:
    """Return what the header says; the tensors of a large file are not read for it."""
    if path.name.lower().endswith(".gguf"):
        return Glance(path.name, _bytes(path, _MAGIC_BYTES), None)
    with _looked_at(path) as file:
        return Glance(path.name, b"", file.header)


def _looked_at(path: Path) -> TensorFile:
    """Return the file; a small one read whole, so that a pointer or a pickle is named."""
    if path.is_file() and path.stat().st_size <= _SMALL_BYTES:
        data = _bytes(path, _SMALL_BYTES)
        return TensorFile.from_bytes(data, where=str(path))
    return TensorFile.open(path, limits=ADAPTER_LIMITS)


def _read(path: Path) -> bytes:
    name = path.name.lower()
    if name.endswith(".safetensors"):
        # Nothing is read of a file whose header is not true.
        _looked_at(path).close()
    most = MAX_WEIGHTS_BYTES if name.endswith(WEIGHTS) else _MAX_CONFIG_BYTES
    data = _bytes(path, most + 1, most)
    if len(data) > most:  # it grew while it was read
        raise _too_large(path, len(data), most)
    return data


def _bytes(path: Path, count: int, most: int | None = None) -> bytes:
    """Return the first bytes of a file, if it has at most so many in all.

    Raises:
        InputError: it cannot be read, is no regular file or is larger.
    """
    try:
        if not path.is_file():
            raise InputError("is no regular file", where=str(path))
        # A named pipe that comes in between would wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(descriptor, "rb") as stream:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise InputError("is no regular file", where=str(path))
            if most is not None and status.st_size > most:
                raise _too_large(path, status.st_size, most)
            return stream.read(min(count, status.st_size + 1))
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from error


def _too_large(path: Path, size: int, most: int) -> InputError:
    return InputError(
        f"the file has {size} bytes, at most {most} are read of an adapter",
        where=str(path),
    )
