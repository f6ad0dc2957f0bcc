"""`Adapter`, the one value of the tensor half: target → update, its base, where it is from.

Loading gives one, composing takes and gives them, hosts and `save` take them. Nothing in
here changes an adapter; `dataclasses.replace` makes a new one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from lora_hub.adapter.update import Update
from lora_hub.manifest.document import Base, Role


@dataclass(frozen=True, slots=True)
class Parent:
    """An adapter that went into a composed one, with its weight."""

    name: str | None
    digest: str | None
    weight: float


@dataclass(frozen=True, slots=True, eq=False)
class Replaced:
    """New numbers for a tensor of the base, or for some rows of it along the first axis.

    Attributes:
        tensor: the whole tensor, or one row for each of `rows`, in the dtype of its file.
        rows: None replaces the whole.
    """

    tensor: Tensor
    role: Role
    rows: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """All that one adapter changes, in memory.

    With a weight w, a replaced tensor W' acts as `W + w * (W' - W)`; updates of the same
    tensor act on what is replaced.

    Attributes:
        updates: target → update, in order of the targets' names.
        name: `namespace/name`, or what its owner calls it; None where it has none.
        version: of the package it came from.
        digest: the package digest, the adapter's identity; None for one made in memory.
        base: the base told by content; None where it was never identified.
        base_name: what the author called the base; a hint, never an identity.
        task_type: PEFT's task type, e.g. CAUSAL_LM.
        parents: what it was composed from.
        replaced: name of a tensor of the base → what takes its place.
        alora_tokens: of an aLoRA, which acts from their last occurrence on; else empty.
        ties_weights: whether an update of the input embedding is meant for the output
            embedding tied to it too.
    """

    updates: Mapping[str, Update]
    name: str | None = None
    version: str | None = None
    digest: str | None = None
    base: Base | None = None
    base_name: str | None = None
    task_type: str | None = None
    parents: tuple[Parent, ...] = ()
    replaced: Mapping[str, Replaced] = field(default_factory=dict)
    alora_tokens: tuple[int, ...] = ()
    ties_weights: bool = False
