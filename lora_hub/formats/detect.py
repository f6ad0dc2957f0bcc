"""Which dialect an adapter's directory speaks, and the adapter in it.

`DIALECTS` is the table of what is read; `_FOREIGN` names what has the same file names and
another meaning. Only the files a dialect names are ever opened: a pickle that lies beside
them is never read.
"""

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_hub import strict_json
from lora_hub.errors import FormatError, InputError
from lora_hub.formats import peft, peft_config
from lora_hub.formats.source import AdapterSource
from lora_hub.tensors.file import TensorFile

# Unpickling runs code of the file's author.
PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")


@dataclass(frozen=True, slots=True)
class Dialect:
    """One way to keep an adapter as two files.

    Attributes:
        is_spoken: whether the object in `config_name` is of this dialect.
        check: config, where → raises `FormatError` where it says what is not read.
        read: config, tensors, where → the adapter.
    """

    name: str
    config_name: str
    weights_name: str
    is_spoken: Callable[[Mapping[str, Any]], bool]
    check: Callable[[Mapping[str, Any], str], None]
    read: Callable[[Mapping[str, Any], TensorFile, str], AdapterSource]


DIALECTS = (
    Dialect(
        name="PEFT",
        config_name=peft_config.CONFIG_NAME,
        weights_name=peft.WEIGHTS_NAME,
        is_spoken=lambda config: "peft_type" in config,
        check=peft_config.check_config,
        read=lambda config, tensors, where: peft.read_peft(config, tensors, where=where),
    ),
)

_HINT = "give a folder saved by PEFT: adapter_config.json, adapter_model.safetensors"

# Keys found together in an adapter_config.json → whose it is.
_FOREIGN = (
    ({"fine_tune_type"}, "MLX-LM's"),
    ({"lora_parameters"}, "MLX-LM's"),
    ({"model_class", "model_type"}, "AdapterHub's"),
    ({"config", "hidden_size"}, "AdapterHub's"),
)


def open_adapter(folder: Path) -> AdapterSource:
    """Return the adapter in a folder, in any dialect of the table.

    Symbolic links are followed: the folder is the caller's own, often a download cache.

    Raises:
        InputError: the folder or a file in it cannot be read; `FormatError`,
            `DocumentError` and `TensorFileError` say what is wrong with the content.
    """
    where = str(folder)
    try:
        names = os.listdir(folder)
    except FileNotFoundError as error:
        raise InputError("there is no such folder", where=where) from error
    except NotADirectoryError as error:
        raise InputError(
            "this is a file, expected an adapter's folder", where=where
        ) from error
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=where) from error
    return source_from_files(lambda name: _read(folder / name), names, where=where)


def source_from_files(
    read: Callable[[str], bytes], names: Collection[str], *, where: str
) -> AdapterSource:
    """Return the adapter in files that `read` gives by name.

    Args:
        read: file name → its bytes.
        names: of all files there are; only those of the dialect are read.
        where: what to call the place in messages.

    Raises:
        FormatError: there is no adapter, it is of a dialect not read yet, or something in
            it cannot be applied exactly. DocumentError, TensorFileError: a file is broken.
    """
    candidates = [dialect for dialect in DIALECTS if dialect.config_name in names]
    if not candidates:
        raise FormatError(_without_config(names), where=where, hint=_HINT)
    for dialect in candidates:
        config_where = f"{where}/{dialect.config_name}"
        config = strict_json.decode_object(read(dialect.config_name), where=config_where)
        if dialect.is_spoken(config):
            return _read_dialect(dialect, config, read, names, where)
    raise FormatError(
        f"the config is {_owner(config)}",
        where=config_where,
        hint=_HINT,
    )


def _read_dialect(
    dialect: Dialect,
    config: Mapping[str, Any],
    read: Callable[[str], bytes],
    names: Collection[str],
    where: str,
) -> AdapterSource:
    # Before the weights: what the config says tells more than a file that is missing.
    dialect.check(config, f"{where}/{dialect.config_name}")
    if dialect.weights_name not in names:
        raise _without_weights(dialect, names, where)
    weights_where = f"{where}/{dialect.weights_name}"
    tensors = TensorFile.from_bytes(read(dialect.weights_name), where=weights_where)
    return dialect.read(config, tensors, where)


def _without_config(names: Collection[str]) -> str:
    wanted = " or ".join(dialect.config_name for dialect in DIALECTS)
    weights = _having(names, ".safetensors")
    if weights:
        return (
            f"there is no {wanted} beside {weights[0]!r}: without it nobody knows the "
            "scaling of the factors"
        )
    pickles = _having(names, *PICKLES)
    if pickles:
        return f"there is no {wanted}, and {pickles[0]!r} is a pickle, which is never read"
    return f"there is no {wanted}: no adapter is here"


def _without_weights(dialect: Dialect, names: Collection[str], where: str) -> FormatError:
    weights = _having(names, ".safetensors")
    pickles = _having(names, *PICKLES)
    if weights:
        return FormatError(
            f"there is no {dialect.weights_name}; found {', '.join(map(repr, weights))}",
            where=where,
            hint=f"if that is the adapter's file, rename it to {dialect.weights_name}",
        )
    if pickles:
        return FormatError(
            f"{pickles[0]!r} is a pickle, which can run code and is never read",
            where=where,
            hint="load it where you trust it and save it again with PEFT 0.18 or later",
        )
    return FormatError(f"there is no {dialect.weights_name}", where=where)


def _owner(config: Mapping[str, Any]) -> str:
    for keys, owner in _FOREIGN:
        if keys <= config.keys():
            return f"{owner}, which is not read yet"
    return "none that is known: it names no peft_type"


def _having(names: Collection[str], *suffixes: str) -> list[str]:
    return sorted(name for name in names if name.lower().endswith(suffixes))


def _read(path: Path) -> bytes:
    try:
        # A named pipe would wait for its writer.
        if not path.is_file():
            raise InputError("is no regular file", where=str(path))
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from error
