"""What an engine's adapter needs to know of the base: which modules there are, and bytes.

Read from a checkpoint's headers; a tensor's bytes only where they are compared.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lora_hub.formats.source import AdapterSource, Replacement
from lora_hub.tensors.checkpoint import Checkpoint

_SUFFIX = ".weight"


@dataclass(frozen=True, slots=True)
class Modules:
    """The linear modules of a base: path → (out_features, in_features)."""

    shapes: Mapping[str, tuple[int, int]]
    where: str


@contextlib.contextmanager
def opened(base: Path | None) -> Iterator[Checkpoint | None]:
    """Give the checkpoint in a folder, or None without one."""
    if base is None:
        yield None
        return
    with Checkpoint.open(base) as checkpoint:
        yield checkpoint


def modules_of(checkpoint: Checkpoint) -> Modules:
    """Return the modules whose weight has two axes, by their paths."""
    return Modules(
        shapes={
            name.removesuffix(_SUFFIX): (info.shape[0], info.shape[1])
            for name, info in checkpoint.tensors.items()
            if name.endswith(_SUFFIX) and len(info.shape) == 2
        },
        where=checkpoint.where,
    )


def is_own(replacement: Replacement, source: AdapterSource, base: Checkpoint) -> bool:
    """Return whether a replaced tensor is the base's own, bit for bit."""
    info = base.tensors.get(replacement.name)
    tensor = replacement.tensor
    if info is None or (info.dtype, info.shape) != (tensor.dtype, tensor.shape):
        return False
    return base.read(replacement.name) == source.tensors.read(tensor.name)
