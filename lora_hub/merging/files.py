"""The files of a checkpoint beside its tensors: which go along, and with what changes.

Loads no torch; `plan.py` asks which files there are, `execute.py` for their bytes.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_hub import strict_json
from lora_hub.errors import InputError
from lora_hub.tensors.checkpoint import (
    CONFIG_NAME,
    INDEX_NAME,
    MAX_INDEX_BYTES,
    SINGLE_NAME,
    Checkpoint,
)
from lora_hub.tensors.file import CHUNK_BYTES
from lora_hub.tensors.foreign import PICKLE_SUFFIXES

PROVENANCE_NAME = "lorahub-merge.json"

# Not taken along: weights in other formats, which would be the unmerged ones; adapters,
# which transformers would attach by itself; and the base's card, which tells of the base.
_LEFT_OUT_SUFFIXES = (
    *PICKLE_SUFFIXES,
    ".safetensors",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".index.json",
)
_LEFT_OUT_NAMES = frozenset({"README.md", "adapter_config.json", PROVENANCE_NAME})


def other_files(base: Checkpoint) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names of the other files to copy, and of what is left out: those below,
    folders, and links that lead nowhere.

    Raises:
        InputError: the base's folder cannot be read.
    """
    shards = {shard.path.name for shard in base.shards}
    try:
        entries = sorted(base.folder.iterdir())
        found = {path.name: path.is_file() for path in entries}
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=base.where) from error
    copied: list[str] = []
    left_out: list[str] = []
    for name, is_file in found.items():
        if name.startswith(".") or name in shards:
            continue
        is_index = name == INDEX_NAME and SINGLE_NAME not in shards
        is_left_out = name in _LEFT_OUT_NAMES or name.endswith(_LEFT_OUT_SUFFIXES)
        if is_file and (is_index or not is_left_out):
            copied.append(name)
        else:
            left_out.append(name)
    return tuple(copied), tuple(left_out)


@dataclass(frozen=True, slots=True)
class Edits:
    """What the files that speak of tensors must say otherwise than in the base.

    Attributes:
        dtype: what all floating-point tensors are written as; None: each as it was.
        new: tensor that the base does not have → the file it lies in.
        parameters: how many numbers the new tensors have.
        size_bytes: of all tensors in the result.
        is_untied: whether the head got a tensor of its own.
    """

    size_bytes: int
    dtype: str | None = None
    new: Mapping[str, str] = field(default_factory=dict)
    parameters: int = 0
    is_untied: bool = False

    @property
    def is_needed(self) -> bool:
        return self.dtype is not None or bool(self.new) or self.is_untied


def chunks(path: Path, edits: Edits) -> Iterator[bytes]:
    """Give the bytes that a copied file will have.

    They are the file's own, unless it speaks of something that the result has otherwise.

    Raises:
        DocumentError: a file that is to be edited is no JSON object.
        OSError: the file cannot be read.
    """
    edit = _EDITS.get(path.name)
    if edit is not None and edits.is_needed:
        document = strict_json.read_object(path, max_bytes=MAX_INDEX_BYTES)
        edit(document, edits)
        yield (json.dumps(document, indent=2, sort_keys=True) + "\n").encode()
        return
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            yield chunk


def _edit_config(config: dict[str, Any], edits: Edits) -> None:
    # Models of text and images have a config for each.
    places = [config, *(place for place in config.values() if isinstance(place, dict))]
    if edits.dtype is not None:
        # transformers 5 says "dtype", earlier ones "torch_dtype".
        older = "torch_dtype" in config and "dtype" not in config
        _set(places, "torch_dtype" if older else "dtype", edits.dtype)
    if edits.is_untied:
        _set(places, "tie_word_embeddings", value=False)


def _set(places: list[dict[str, Any]], key: str, value: object) -> None:
    """Set a key in the first place, and in the others where it is said."""
    for place in places:
        if place is places[0] or key in place:
            place[key] = value


def _edit_index(index: dict[str, Any], edits: Edits) -> None:
    metadata = index.get("metadata")
    kept = metadata if isinstance(metadata, dict) else {}
    index["metadata"] = kept | {"total_size": edits.size_bytes}
    if isinstance(kept.get("total_parameters"), int):
        index["metadata"]["total_parameters"] = kept["total_parameters"] + edits.parameters
    index["weight_map"] = index["weight_map"] | edits.new


_EDITS: Mapping[str, Callable[[dict[str, Any], Edits], None]] = {
    CONFIG_NAME: _edit_config,
    INDEX_NAME: _edit_index,
}
