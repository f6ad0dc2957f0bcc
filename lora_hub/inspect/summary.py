"""What an adapter is, in numbers: ranks, sizes, and how far it moves each weight.

Norms are those of `factors.py`: the dense delta is never formed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lora_hub.formats.source import AdapterSource, UpdateSource
from lora_hub.inspect.factors import Figures, figures_of
from lora_hub.manifest.document import Manifest
from lora_hub.scaling import ScalingRule


@dataclass(frozen=True, slots=True)
class ModuleSummary:
    """One target.

    Attributes:
        shape: (out_features, in_features) of the weight it changes.
        frobenius: norm of the delta; None where it is not finite.
    """

    module: str
    rank: int
    alpha: float
    scaling: float
    dtype: str
    shape: tuple[int, int]
    parameters: int
    frobenius: float | None


@dataclass(frozen=True, slots=True)
class Summary:
    """An adapter and, where it has a manifest, what that says.

    Attributes:
        name: namespace/name and version; None for a bare directory.
        base: the author's name of the base, a hint; None where nothing says.
        base_root: fingerprint of the base; None for a bare directory.
        frobenius: norm over all deltas together; None where it is not finite.
    """

    name: str | None
    version: str | None
    summary: str | None
    license: str | None
    task: str | None
    base: str | None
    base_root: str | None
    rule: ScalingRule
    parameters: int
    size_bytes: int
    frobenius: float | None
    modules: tuple[ModuleSummary, ...]


def summarize(source: AdapterSource, manifest: Manifest | None = None) -> Summary:
    """Return the summary of an adapter; reads every factor once."""
    modules = tuple(map(_module, source.updates, figures_of(source)))
    hints = manifest.base.hints if manifest else ()
    return Summary(
        name=manifest.name if manifest else None,
        version=manifest.version if manifest else None,
        summary=manifest.summary if manifest else None,
        license=manifest.license if manifest else None,
        task=manifest.task.id if manifest else None,
        base=f"{hints[0].hub}:{hints[0].repo}" if hints else source.base_name,
        base_root=manifest.base.root if manifest else None,
        rule=source.updates[0].rule,
        parameters=sum(module.parameters for module in modules),
        size_bytes=source.tensors.header.file_size,
        frobenius=_together([module.frobenius for module in modules]),
        modules=modules,
    )


def _module(update: UpdateSource, figures: Figures) -> ModuleSummary:
    return ModuleSummary(
        module=update.target,
        rank=update.rank,
        alpha=update.alpha,
        scaling=update.scaling,
        dtype=update.a.dtype,
        shape=(update.b.shape[0], update.a.shape[1]),
        parameters=update.a.elements + update.b.elements,
        frobenius=figures.frobenius,
    )


def _together(norms: Sequence[float | None]) -> float | None:
    finite = [norm for norm in norms if norm is not None]
    return math.hypot(*finite) if len(finite) == len(norms) else None
