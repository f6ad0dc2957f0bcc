"""The tensor half as users call it: adapters on models, composed, merged."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from lora_hub import extras, settings, sizes

# Said in our words here, before the imports below would say it in Python's.
for _module in ("torch", "jaxtyping"):
    extras.require(_module, extra="torch")

from lora_hub.adapter.adapter import Adapter
from lora_hub.adapter.load import load
from lora_hub.adapter.save import save as save_adapter
from lora_hub.base.fit import check_fit
from lora_hub.base.folder import FolderBase
from lora_hub.composing.compose import compose as compose_adapters
from lora_hub.errors import InputError
from lora_hub.formats.dialect import ReadOptions
from lora_hub.merging import execute as merging
from lora_hub.merging.plan import MergePlan, Part
from lora_hub.merging.plan import plan as plan_merge
from lora_hub.public.find import Found, find
from lora_hub.runtime.host import Host
from lora_hub.runtime.product import Kernels

if TYPE_CHECKING:
    from torch import nn

    from lora_hub.manifest.document import Policy

PathLike = str | os.PathLike[str]
# References or folders, each with its weight.
Named = Mapping[str, float] | Sequence[tuple[PathLike, float]]
# The same, or adapters in memory.
Parts = Mapping[str, float] | Sequence[tuple[PathLike | Adapter, float]]
Note = Callable[[str], None]


def _silent(_text: str) -> None:
    """Drop what would be said on a terminal."""


def attach(
    model: "nn.Module",
    registry: PathLike | None = None,
    *,
    base: PathLike | None = None,
    budget: int | str | None = None,
    host_budget: int | str | None = None,
    reserve: str | Sequence[str] = (),
    kernels: Kernels = "auto",
) -> Host:
    """Return a host for adapters on a model; nothing changes until an adapter is used.

    Args:
        model: any `torch.nn.Module`, on any device.
        registry: a folder or a configured name, where references are looked up.
        base: folder of the base, for adapters that cannot be read without it: VeRA, and
            dialects with names of their own.
        budget: the most bytes that adapters may take beside the model, as a number or as
            text such as "200MB". What is not used then leaves when another adapter needs
            its room, and comes back when it is used. Without it nothing leaves.
        host_budget: the most bytes of copies in the host's memory, for a model that is not
            on the CPU; as many as `budget` by default.
        reserve: layers that get their hook at once, so that a model compiled afterwards is
            not compiled again, whatever is used: "all-linear", or names such as "q_proj".
        kernels: what computes products of factors on a GPU: "torch"; "triton", the
            grouped kernels, for all that they can; "auto", those for rows with adapters of
            their own, where they run.

    Raises:
        InputError: a budget is no size, a name that of no layer, or `kernels` none of the
            three or asked for where they do not run.
    """
    if kernels not in get_args(Kernels):
        raise InputError(
            f"kernels={kernels!r} is no choice",
            hint=f"one of {', '.join(map(repr, get_args(Kernels)))}",
        )
    options = _read_with(base)
    return Host(
        model,
        lambda what: find(what, registry, options=options),
        budget=_bytes(budget, "budget"),
        host_budget=_bytes(host_budget, "host_budget"),
        reserve=reserve,
        kernels=kernels,
    )


def _bytes(size: int | str | None, where: str) -> int | None:
    return None if size is None else sizes.to_bytes(size, where=where)


def load_adapter(
    what: PathLike, registry: PathLike | None = None, *, base: PathLike | None = None
) -> Adapter:
    """Return the adapter that a reference or a folder means, in memory; see `attach`."""
    return _load(find(what, registry, options=_read_with(base)), _silent)


def save(adapter: Adapter, out: PathLike) -> None:
    """Write an adapter as a folder that PEFT loads; see `adapter/save.py`."""
    save_adapter(adapter, Path(out))


def compose(
    parts: Parts,
    method: str = "linear",
    *,
    registry: PathLike | None = None,
    note: Note = _silent,
) -> Adapter:
    """Return one adapter whose delta is the weighted sum of the parts' deltas.

    Args:
        parts: {reference: weight}, or pairs of a reference, a folder or an `Adapter`, and
            its weight.
        method: a name of `composing/methods.py`.
        registry: where references are looked up.
        note: is told what a person should hear, such as that a key was pinned.

    Raises:
        ComposeError: the parts cannot be combined.
    """
    pairs = parts.items() if isinstance(parts, Mapping) else parts
    loaded = [
        (what if isinstance(what, Adapter) else _load(find(what, registry), note), weight)
        for what, weight in pairs
    ]
    return compose_adapters(loaded, method)


def merge(
    base: PathLike,
    adapters: Named,
    out: PathLike,
    *,
    dtype: str | None = None,
    untie: bool = False,
    policy: "Policy | None" = None,
    registry: PathLike | None = None,
    note: Note = _silent,
    progress: merging.Progress | None = None,
) -> merging.MergeReport:
    """Merge adapters into the weights of a base, as a checkpoint folder.

    Args:
        base: the folder of the base, checked to be the one each adapter was made for.
        adapters: {reference or folder: weight}.
        out: a folder that does not exist yet; it appears when it is whole.
        dtype: bfloat16, float16, float32 or float64 for all floating-point tensors; as
            the base has them without.
        untie: give a head that shares its tensor with the embedding one of its own, which
            an adapter that changes only one of the two needs.
        policy: how strictly the base is compared; as each manifest says without.
        registry: where references are looked up.
        note: is told what a person should hear.
        progress: is told bytes written and bytes in all.

    Raises:
        FitError: an adapter was not made for this base, or changes one use of a tensor
            that the base uses twice.
        ComposeError: what an adapter does cannot be merged.
        StoreError: `out` is taken or cannot be written.
    """
    with _planned(base, adapters, policy, registry, note, dtype=dtype, untie=untie) as (
        view,
        parts,
        plan,
    ):
        return merging.execute(plan, view.checkpoint, parts, Path(out), progress=progress)


def merge_plan(
    base: PathLike,
    adapters: Named,
    *,
    dtype: str | None = None,
    untie: bool = False,
    policy: "Policy | None" = None,
    registry: PathLike | None = None,
    note: Note = _silent,
) -> MergePlan:
    """Return what `merge` would do, without writing anything; `str` of it is for people."""
    with _planned(base, adapters, policy, registry, note, dtype=dtype, untie=untie) as (
        _,
        _,
        plan,
    ):
        return plan


@contextmanager
def _planned(
    base: PathLike,
    adapters: Named,
    policy: "Policy | None",
    registry: PathLike | None,
    note: Note,
    *,
    dtype: str | None,
    untie: bool,
) -> Iterator[tuple[FolderBase, list[Part], MergePlan]]:
    pairs = adapters.items() if isinstance(adapters, Mapping) else adapters
    parts: list[Part] = []
    root = None
    with FolderBase.open(Path(base), settings.cache_folder() / "bases") as view:
        for what, weight in pairs:
            found = find(what, registry, options=_read_with(base))
            if found.base is not None:
                fit = check_fit(found.base, view, policy=policy)
                # Only a comparison of all tensors proves the root.
                root = found.base.root if fit.policy == "exact" else root
            for text in found.notes:
                note(text)
            parts.append(
                Part(found.source, float(weight), found.name, found.version, found.digest)
            )
        plan = plan_merge(view.checkpoint, parts, dtype=dtype, untie=untie, base_root=root)
        yield view, parts, plan


def _read_with(base: PathLike | None) -> ReadOptions:
    return ReadOptions(base=None if base is None else Path(base))


def _load(found: Found, note: Note) -> Adapter:
    for text in found.notes:
        note(text)
    return load(
        found.source,
        name=found.name,
        version=found.version,
        digest=found.digest,
        base=found.base,
    )
