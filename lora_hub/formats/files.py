"""The files of an adapter's folder, or one file of weights and the config beside it.

Looking does not read the weights: a folder may turn out to hold a whole model.
"""

import os
from collections.abc import Callable
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

_MAGIC_BYTES = 4


@dataclass(frozen=True, slots=True)
class Files:
    """What can be asked of an adapter's files.

    Attributes:
        where: what to call the folder in messages.
        read: file name → its bytes.
        glance: file name → what its header says.
        chosen: the file of weights that the caller named, if one.
    """

    where: str
    names: frozenset[str]
    read: Callable[[str], bytes]
    glance: Callable[[str], Glance]
    chosen: str | None = None

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
    if path.name.lower().endswith(WEIGHTS) and path.is_file():
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
    )


def _glance(path: Path) -> Glance:
    """Return what the header says; the tensors of a large file are not read for it."""
    if path.name.lower().endswith(".gguf"):
        try:
            with path.open("rb") as stream:
                return Glance(path.name, stream.read(_MAGIC_BYTES), None)
        except OSError as error:
            raise InputError(
                f"cannot be read: {error.strerror}", where=str(path)
            ) from error
    with TensorFile.open(path, limits=ADAPTER_LIMITS) as file:
        return Glance(path.name, b"", file.header)


def _read(path: Path) -> bytes:
    try:
        # A named pipe would wait for its writer.
        if not path.is_file():
            raise InputError("is no regular file", where=str(path))
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from error
