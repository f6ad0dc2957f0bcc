"""`lorahub-merge.json`: what a merged checkpoint was made of, told by content.

No times and no paths, so the same merge gives the same bytes anywhere.
"""

import msgspec

from lora_hub import canonical
from lora_hub.merging.plan import MergePlan

SCHEMA = "lorahub.merge/1"


class MergedAdapter(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One adapter, by name for people and by package digest for certain."""

    weight: float
    name: str | None = None
    version: str | None = None
    digest: str | None = None


class Merge(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The whole of the file.

    `base_root` is the fingerprint of the base, absent where nobody asked for it; `dtype` is
    absent where every tensor kept its own. `replaced` and `new` name the tensors whose
    numbers are an adapter's and those that the base does not have; `untied` is the head
    that got a tensor of its own.
    """

    schema: str
    adapters: tuple[MergedAdapter, ...]
    base_root: str | None = None
    dtype: str | None = None
    replaced: tuple[str, ...] = ()
    new: tuple[str, ...] = ()
    untied: str | None = None


def encode(plan: MergePlan) -> bytes:
    """Return the file's bytes, canonical JSON."""
    merge = Merge(
        schema=SCHEMA,
        adapters=tuple(
            MergedAdapter(
                weight=part.weight, name=part.name, version=part.version, digest=part.digest
            )
            for part in plan.parts
        ),
        base_root=plan.base_root,
        dtype=plan.dtype,
        replaced=tuple(tensor.name for _, tensor in plan.tensors("replace")),
        new=tuple(tensor.name for _, tensor in plan.tensors("new")),
        untied=plan.untied,
    )
    return canonical.encode(msgspec.to_builtins(merge))
