"""A checkpoint folder as one table of tensors, however many files it is cut into.

Either `model.safetensors`, or `model.safetensors.index.json` and the shards it names;
diffusers says `diffusion_pytorch_model` for `model`. The index is checked against the
shards' own headers, so that what it says is what is there. Which model the tensors make is
told by `base/`.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from lora_hub import strict_json
from lora_hub.errors import DocumentError, InputError
from lora_hub.tensors.file import TensorFile
from lora_hub.tensors.foreign import PICKLE_SUFFIXES
from lora_hub.tensors.header import TensorInfo

STEM = "model"
_INDEX = ".safetensors.index.json"
SINGLE_NAME = f"{STEM}.safetensors"
INDEX_NAME = f"{STEM}{_INDEX}"
CONFIG_NAME = "config.json"

# A million tensors with names of sixty characters.
MAX_INDEX_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file of a checkpoint."""

    path: Path
    file: TensorFile


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An open checkpoint folder; close it, or use it in a `with` block.

    Attributes:
        tensors: name → tensor, shard by shard, each in the order of its bytes; offsets
            count within the shard.
        shards: in the order of their names.
        config: what `config.json` says, {} where there is none.
    """

    folder: Path
    tensors: Mapping[str, TensorInfo]
    shards: tuple[Shard, ...]
    config: Mapping[str, Any]
    _home: Mapping[str, Shard] = field(repr=False)

    @classmethod
    def open(cls, folder: Path, stem: str = STEM) -> Self:
        """Return the checkpoint in a folder.

        Args:
            folder: what holds the files.
            stem: how the names of weights and index begin.

        Raises:
            InputError: the folder holds no safetensors checkpoint, only pickles, or a
                file cannot be read.
            DocumentError: the index or `config.json` is malformed, or the index does not
                say what the shards hold.
            TensorFileError: a shard is malformed.
        """
        # Where both are there, transformers takes the single file, and so do we.
        single, index_path = f"{stem}.safetensors", folder / f"{stem}{_INDEX}"
        index = None if _exists(folder / single) else _read_index(index_path)
        names = [single] if index is None else sorted(set(index.values()))
        config = (
            strict_json.read_object(folder / CONFIG_NAME)
            if _exists(folder / CONFIG_NAME)
            else {}
        )
        with contextlib.ExitStack() as opened:
            shards = tuple(
                Shard(folder / name, opened.enter_context(TensorFile.open(folder / name)))
                for name in names
            )
            if index is not None:
                _check_index(index, shards, str(index_path))
            opened.pop_all()
        if not any(shard.file.header.tensors for shard in shards):
            raise InputError("the checkpoint holds no tensors", where=str(folder))
        tensors = {
            name: info
            for shard in shards
            for name, info in shard.file.header.tensors.items()
        }
        home = {name: shard for shard in shards for name in shard.file.header.tensors}
        return cls(folder, tensors, shards, config, home)

    @property
    def where(self) -> str:
        return str(self.folder)

    def shard_of(self, name: str) -> Shard:
        """Return the shard that holds the tensor.

        Raises:
            InputError: there is no such tensor.
        """
        try:
            return self._home[name]
        except KeyError:
            raise InputError(f"holds no tensor {name!r}", where=self.where) from None

    def read(self, name: str, start: int = 0, stop: int | None = None) -> memoryview:
        """Return bytes `start` to `stop` of a tensor; as `TensorFile.read`."""
        return self.shard_of(name).file.read(name, start, stop)

    def read_into(self, name: str, start: int, buffer: bytearray | memoryview) -> None:
        """Fill the buffer with a tensor's bytes from `start` on."""
        self.shard_of(name).file.read_into(name, start, buffer)

    def close(self) -> None:
        for shard in self.shards:
            shard.file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:  # no permission to look, or a name beyond all limits
        raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from error


def _read_index(path: Path) -> dict[str, str]:
    """Return tensor name → file name of the folder's index."""
    if not _exists(path):
        raise _no_checkpoint(path.parent)
    where = str(path)
    document = strict_json.read_object(path, max_bytes=MAX_INDEX_BYTES)
    weight_map = document.get("weight_map")
    if not isinstance(weight_map, dict):
        raise DocumentError(
            "the field weight_map is missing or is no object", where=f"{where}#/weight_map"
        )
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str) or not _is_plain(file_name):
            raise DocumentError(
                f"{name!r} is said to lie in {file_name!r}, expected the name of a "
                ".safetensors file in the same folder",
                where=f"{where}#/weight_map",
            )
    return weight_map


def _is_plain(name: str) -> bool:
    return (
        name.endswith(".safetensors")
        and name.isprintable()
        and not name.startswith(".")
        and not any(character in name for character in "/\\:")
    )


def _check_index(index: Mapping[str, str], shards: tuple[Shard, ...], where: str) -> None:
    for shard in shards:
        held = shard.file.header.tensors.keys()
        said = {name for name, file_name in index.items() if file_name == shard.path.name}
        for name in sorted(said - held):
            raise DocumentError(
                f"the index says that {shard.path.name} holds {name!r}, it does not",
                where=where,
                hint="a shard belongs to another checkpoint; fetch the folder again",
            )
        for name in sorted(held - said):
            raise DocumentError(
                f"{shard.path.name} holds {name!r}, the index says it lies in "
                f"{index.get(name, 'no file')}",
                where=where,
                hint="a shard belongs to another checkpoint; fetch the folder again",
            )


def _no_checkpoint(folder: Path) -> InputError:
    where = str(folder)
    if not folder.is_dir():
        return InputError(
            "is no folder" if folder.exists() else "there is no such folder",
            where=where,
            hint=f"name the folder that holds {SINGLE_NAME} and {CONFIG_NAME}",
        )
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        return InputError(f"cannot be read: {error.strerror}", where=where)
    pickles = [name for name in names if name.lower().endswith(PICKLE_SUFFIXES)]
    if pickles:
        return InputError(
            f"holds weights only as a pickle ({pickles[0]}), which runs code when opened",
            where=where,
            hint="save the model with transformers' save_pretrained, which writes "
            "safetensors",
        )
    return InputError(
        f"holds neither {SINGLE_NAME} nor {INDEX_NAME}",
        where=where,
        hint="name the folder of a base model as transformers saves it",
    )
