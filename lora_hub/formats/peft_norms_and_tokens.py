"""LN tuning and trainable tokens of PEFT: tensors of the base that come anew.

LN tuning brings whole normalisation layers, trainable tokens some rows of the embedding.
Nothing is computed: the tensors stay where they are in the file.

Sources: Zhao et al. 2024, arXiv:2312.11420; PEFT 0.21.2, `tuners/ln_tuning/layer.py` and
`tuners/trainable_tokens/layer.py`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_hub.embeddings import HEADS, INPUTS, last_part
from lora_hub.errors import FormatError
from lora_hub.formats.peft_methods import is_names, labels, open_method
from lora_hub.formats.source import AdapterSource, Replacement
from lora_hub.tensors.arrays import FLOATS
from lora_hub.tensors.file import TensorFile

_LAYERS = "ln_tuning_layers"
_TOKENS = "trainable_tokens_delta"


def read_ln_tuning(
    config: Mapping[str, Any], tensors: TensorFile, where: str, base: Path | None = None
) -> AdapterSource:
    """Return the adapter in PEFT's files; see `peft_types.Reader`.

    Raises:
        FormatError: config and tensors disagree, or hold something else.
    """
    names = {f"{_LAYERS}.weight": "weight", f"{_LAYERS}.bias": "bias"}
    method = open_method(config, tensors, where, names=names)
    found = []
    for held in method.held:
        for name, tensor in held.tensors.items():
            if tensor.dtype not in FLOATS or len(tensor.shape) != 1:
                method.refuse(held, f"{name} is {tensor.dtype} {list(tensor.shape)}")
            found.append(
                Replacement(f"{held.target}.{names[name]}", "modules_to_save", tensor)
            )
    return AdapterSource(
        updates=(),
        tensors=tensors,
        replacements=tuple(
            sorted((*found, *method.saved), key=lambda replacement: replacement.name)
        ),
        **labels(config),
    )


def read_trainable_tokens(
    config: Mapping[str, Any], tensors: TensorFile, where: str, base: Path | None = None
) -> AdapterSource:
    """Return the adapter in PEFT's files; see `peft_types.Reader`.

    The rows take the place of the embedding's: despite its name the tensor is no
    difference. Of a model whose head is the embedding PEFT saves them for both, and they
    are the embedding's here.

    Raises:
        FormatError: config and tensors disagree, or hold something else.
    """
    method = open_method(
        config,
        tensors,
        where,
        names={_TOKENS},
        read={"token_indices"},
        inert={"init_weights"},
        apart=_copies(config, tensors),
    )
    rows = config.get("token_indices")
    if (
        not isinstance(rows, list)
        or not all(type(row) is int and row >= 0 for row in rows)
        or len(set(rows)) < len(rows)
    ):
        raise FormatError(
            f"token_indices is {str(rows)[:60]}, expected a list of unlike numbers from 0",
            where=method.config_where,
        )
    for held in method.held:
        shape = held.tensors[_TOKENS].shape
        if held.tensors[_TOKENS].dtype not in FLOATS or (len(shape), *shape[:1]) != (
            2,
            len(rows),
        ):
            method.refuse(
                held,
                f"{_TOKENS} is {held.tensors[_TOKENS].dtype} {list(shape)}; expected "
                f"[{len(rows)}, …], a row for each of token_indices",
            )
    return AdapterSource(
        updates=(),
        tensors=tensors,
        replacements=tuple(
            Replacement(
                f"{held.target}.weight", "token_delta", held.tensors[_TOKENS], tuple(rows)
            )
            for held in method.held
        ),
        **labels(config),
    )


def _copies(config: Mapping[str, Any], tensors: TensorFile) -> set[str]:
    """Return the tensors of a tied head, which are the embedding's once more.

    A head that the config names has rows of its own.
    """
    held = {
        name.removesuffix(f".{_TOKENS}"): tensor
        for name, tensor in tensors.header.tensors.items()
        if name.endswith(f".{_TOKENS}")
    }
    rows = [
        tensors.read(tensor.name)
        for key, tensor in held.items()
        if last_part(key) in INPUTS
    ]
    said = config.get("target_modules")
    named = tuple(said) if is_names(said) and isinstance(said, list) else ()
    return {
        tensor.name
        for key, tensor in held.items()
        if last_part(key) in HEADS
        and not key.endswith(named)
        and tensors.read(tensor.name) in rows
    }
