"""PEFT's directory as a row of the table of dialects: the files that `peft.py` reads.

What the config and the names mean is told there; here is only what a conversion needs.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_hub import canonical
from lora_hub.formats import factors, peft
from lora_hub.formats.dialect import FEATURES, Given, ReadOptions, Written
from lora_hub.formats.peft_config import CONFIG_NAME
from lora_hub.formats.source import AdapterSource
from lora_hub.tensors.file import TensorFile

WEIGHTS_NAME = peft.WEIGHTS_NAME
SAYS = frozenset(FEATURES)


def claim_config(config: Mapping[str, Any]) -> str | None:
    if "peft_type" not in config:
        return None
    return f"{CONFIG_NAME} names peft_type {config['peft_type']!r}"


def read(given: Given, options: ReadOptions) -> AdapterSource:
    """Return what `peft.read_peft` does."""
    tensors = TensorFile.from_bytes(given.weights, where=given.weights_where)
    return peft.read_peft(given.config, tensors, where=given.where)


def write(source: AdapterSource, base: Path | None = None) -> Written:
    """Return the directory that PEFT loads; it can say every adapter of linear layers.

    A path on the author's machine is left out: it tells nothing about the base.
    """
    parts = factors.of_source(source)
    name, notes = source.base_name, []
    if name is not None and (name.startswith(("/", ".", "~")) or "\\" in name):
        notes.append("the base was named by a local path, which is left out")
        name = None
    config = peft.build_config(
        {part.target: (part.rank, part.alpha) for part in parts},
        parts[0].rule,
        task_type=source.task_type,
        base_name=name,
        revision=source.base_revision if name else None,
    )
    tensors: dict[str, factors.Matrix] = {}
    for part in parts:
        name_a, name_b = peft.tensor_names(part.target)
        tensors |= {name_a: part.a, name_b: part.b}
    files = {
        CONFIG_NAME: (canonical.encode(config),),
        WEIGHTS_NAME: factors.safetensors(tensors),
    }
    return Written(files, tuple(notes))
