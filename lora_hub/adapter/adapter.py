"""`Adapter`, the one value of the tensor half: target → update, its base, where it is from.

Loading gives one, composing takes and gives them, hosts and `save` take them. Nothing in
here changes an adapter; `dataclasses.replace` makes a new one.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from lora_hub.adapter.update import Update
from lora_hub.manifest.document import Base


@dataclass(frozen=True, slots=True)
class Parent:
    """An adapter that went into a composed one, with its weight."""

    name: str | None
    digest: str | None
    weight: float


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """All updates of one adapter, in memory.

    Attributes:
        updates: target → update, in order of the targets' names.
        name: `namespace/name`, or what its owner calls it; None where it has none.
        version: of the package it came from.
        digest: the package digest, the adapter's identity; None for one made in memory.
        base: the base told by content; None where it was never identified.
        base_name: what the author called the base; a hint, never an identity.
        task_type: PEFT's task type, e.g. CAUSAL_LM.
        parents: what it was composed from.
    """

    updates: Mapping[str, Update]
    name: str | None = None
    version: str | None = None
    digest: str | None = None
    base: Base | None = None
    base_name: str | None = None
    task_type: str | None = None
    parents: tuple[Parent, ...] = ()
