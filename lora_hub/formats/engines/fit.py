"""An adapter as a serving engine computes it, or the refusal that says why it cannot.

    source ─ check ─ zero_updates ─ one_scaling ─→ AdapterSource with one scaling

What is then written as PEFT's directory has the same delta on every target, up to the
error that is told.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from lora_hub import canonical
from lora_hub.errors import InputError, LoraHubError
from lora_hub.formats import factors
from lora_hub.formats.engines import refused
from lora_hub.formats.engines.base import is_own, modules_of, opened
from lora_hub.formats.engines.one_scaling import notes, with_one_scaling
from lora_hub.formats.engines.table import ENGINES, Engine
from lora_hub.formats.engines.zero_updates import with_zero_updates
from lora_hub.formats.factors import Chunks
from lora_hub.formats.files import CONFIG_NAME
from lora_hub.formats.fold import NORMAL
from lora_hub.formats.source import AdapterSource

# What comparing in float64 may itself be off.
_FLOAT64 = 2.0**-50


@dataclass(frozen=True, slots=True)
class Fitted:
    """An adapter that an engine reads right.

    Attributes:
        notes: what was done and what to know, a sentence each.
        error: the largest relative error of a number of `scaling * b`; 0.0 where every
            delta is what it was.
    """

    engine: Engine
    source: AdapterSource
    notes: tuple[str, ...]
    error: float


def engine_of(name: str) -> Engine:
    if name not in ENGINES:
        raise InputError(f"{name!r} is no engine", hint=f"engines: {', '.join(ENGINES)}")
    return ENGINES[name]


def fit(source: AdapterSource, engine: Engine, base: Path | None = None) -> Fitted:
    """Return the adapter with one scaling, as the engine reads it.

    Args:
        source: any adapter.
        engine: a row of the table.
        base: folder of the base, where the engine needs more modules than the adapter
            has, and to tell an embedding that was only saved along.

    Raises:
        LossyConversion: the engine would compute something else; `losses` says what.
    """
    with opened(base) as checkpoint:
        kept = source.replacements
        if checkpoint is not None and "embedding weights" in engine.cannot:
            kept = tuple(
                each
                for each in kept
                if each.role != "embedding" or not is_own(each, source, checkpoint)
            )
        left_out = len(source.replacements) - len(kept)
        slim = replace(source, replacements=kept)
        refused.check(slim, engine)
        modules = modules_of(checkpoint) if checkpoint else None
    parts, added = with_zero_updates(factors.of_source(slim), engine, modules)
    found = with_one_scaling(parts, engine)
    where = source.tensors.where
    made = factors.to_source(found.parts, where=where, base_name=source.base_name)
    told = [*added, *notes(found, engine)]
    if left_out:
        told.append(
            f"{left_out} tensors are the base's own, bit for bit: they are left out"
        )
    gpus = max(1, found.rank // 8)
    told += [remark.format(gpus=gpus) for remark in engine.remarks]
    return Fitted(
        engine=engine,
        source=replace(
            made,
            base_revision=source.base_revision,
            task_type=source.task_type,
            alora_tokens=source.alora_tokens,
        ),
        notes=tuple(told),
        error=found.error,
    )


def with_last_parts(
    files: Mapping[str, Chunks], source: AdapterSource
) -> dict[str, Chunks]:
    """Return PEFT's files with `target_modules` as engines expect it: `["q_proj"]`.

    PEFT then makes updates of zeros for modules of these names that the adapter leaves
    alone.
    """
    config = json.loads(b"".join(files[CONFIG_NAME]))
    config["target_modules"] = sorted(
        {update.target.rpartition(".")[2] for update in source.updates}
    )
    return {**files, CONFIG_NAME: (canonical.encode(config),)}


def check(before: AdapterSource, after: AdapterSource, error: float) -> None:
    """Raise unless `after` has the deltas of `before`, up to the error that was told.

    Compares the factors: those of `a` bit for bit, `scaling * b` number by number, and
    what was added must be zeros. A difference is a fault of ours.
    """
    import numpy as np

    old = {part.target: part for part in factors.of_source(before)}
    for part in factors.of_source(after):
        a, b = (each.values() for each in (part.a, part.b))
        product = np.asarray(b, dtype=np.float64) * part.scaling
        if part.target not in old:
            is_same = not product.any()
        else:
            was = old.pop(part.target)
            first = was.a.values()
            wanted = np.asarray(was.b.values(), np.float64)
            wanted = wanted * was.scaling
            small = NORMAL[part.b.dtype] * abs(part.scaling)
            near = np.maximum(np.abs(wanted), small) * (error + _FLOAT64)
            is_same = bool(
                np.array_equal(a[: was.rank], first, equal_nan=True)
                and not a[was.rank :].any()
                and not product[:, was.rank :].any()
                and np.all(
                    (np.abs(product[:, : was.rank] - wanted) <= near) | ~np.isfinite(wanted)
                )
            )
        if not is_same:
            raise LoraHubError(f"{part.target} came out wrong; this is a bug of lora_hub")
    if old:
        raise LoraHubError(
            f"{factors.some(sorted(old))} got lost; this is a bug of lora_hub"
        )
