"""PEFT's directory as a row of the table of dialects: the files that `peft.py` reads.

What the config and the names mean is told there; here is only what a conversion needs.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from lora_hub import canonical
from lora_hub.formats import peft, peft_types, peft_write
from lora_hub.formats.dialect import FEATURES, Given, ReadOptions, Written
from lora_hub.formats.files import CONFIG_NAME
from lora_hub.formats.peft_config import check_config
from lora_hub.formats.source import AdapterSource
from lora_hub.recent import RecentOfSame
from lora_hub.tensors.file import TensorFile
from lora_hub.tensors.write import chunks_of

WEIGHTS_NAME = peft.WEIGHTS_NAME
SAYS = frozenset(FEATURES) - {"scales"}


def claim_config(config: Mapping[str, Any]) -> str | None:
    if "peft_type" not in config:
        return None
    return f"{CONFIG_NAME} names peft_type {config['peft_type']!r}"


def read(given: Given, options: ReadOptions) -> AdapterSource:
    """Return what `peft.read_peft` does, or the reader of another `peft_type`."""
    tensors = TensorFile.from_bytes(given.weights, where=given.weights_where)
    config = given.config
    reader = peft_types.READERS.get(str(config.get("peft_type")))
    if reader is not None:
        check_config(config, f"{given.where}/{CONFIG_NAME}")
        return reader(config, tensors, given.where, options.base)
    initial = options.initial
    if initial is None:
        return _read_plain(config, tensors, given.where)
    from lora_hub.formats import peft_initial  # it reads a directory, as we do

    source = peft.read_peft(config, tensors, where=given.where, initial=initial)
    return peft_initial.subtract(source, config, initial, where=given.where)


_RECENT: RecentOfSame[tuple[bytes, AdapterSource]] = RecentOfSame()
_NO_TENSORS = TensorFile.from_bytes(b"\x02" + bytes(7) + b"{}", where="nowhere")


def _read_plain(
    config: Mapping[str, Any], tensors: TensorFile, where: str
) -> AdapterSource:
    """Return what `peft.read_peft` does, or what it did for the same config and header."""
    try:
        said = msgspec.json.encode(config)
    except (ValueError, OverflowError):  # half of a surrogate pair; beyond 64 bits
        return peft.read_peft(config, tensors, where=where)
    known = _RECENT.get(tensors.header)
    if known is not None and known[0] == said:
        return replace(known[1], tensors=tensors)
    source = peft.read_peft(config, tensors, where=where)
    if not tensors.was_read:  # else the numbers had a part in it
        kept = replace(source, tensors=_NO_TENSORS)
        _RECENT.keep(tensors.header, result=(said, kept))
    return source


def write(source: AdapterSource, base: Path | None = None) -> Written:
    """Return the directory that PEFT loads.

    A path on the author's machine is left out: it tells nothing about the base.

    Raises:
        LossyConversion: PEFT's LoRA cannot say the adapter.
    """
    name, notes = source.base_name, []
    if name is not None and (name.startswith(("/", ".", "~")) or "\\" in name):
        notes.append("the base was named by a local path, which is left out")
        name = None
    config = peft_write.config_for(
        source, base_name=name, revision=source.base_revision if name else None
    )
    tensors = peft_write.tensors_for(source)
    specs = [(name, tensors[name].dtype, tensors[name].shape) for name in sorted(tensors)]
    weights = chunks_of(specs, lambda name: (source.tensors.read(tensors[name].name),))
    files = {CONFIG_NAME: (canonical.encode(config),), WEIGHTS_NAME: tuple(weights)}
    return Written(files, tuple(notes))
