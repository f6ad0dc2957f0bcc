"""What an adapter is, in numbers: ranks, sizes, and how far it moves each weight.

Norms are those of `factors.py`: the dense delta is never formed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lora_hub.base.orientation import weight_shape
from lora_hub.formats.source import AdapterSource, Replacement, ScaleSource, UpdateSource
from lora_hub.inspect.factors import Figures, figures_of
from lora_hub.manifest.document import Layer, Manifest, Role
from lora_hub.scaling import ScalingRule


@dataclass(frozen=True, slots=True)
class ModuleSummary:
    """One target.

    Attributes:
        shape: (out_features, in_features) of the weight it changes, behind the number of
            experts; of a convolution, the shape of its weight.
        frobenius: norm of the delta; None where it is not finite. Of DoRA, of its
            low-rank part.
        is_dora: whether a magnitude stands beside the factors.
        has_bias: whether a bias does.
    """

    module: str
    rank: int
    alpha: float
    scaling: float
    dtype: str
    shape: tuple[int, ...]
    parameters: int
    frobenius: float | None
    layer: Layer = "linear"
    is_dora: bool = False
    has_bias: bool = False


@dataclass(frozen=True, slots=True)
class ScaledSummary:
    """One target whose outputs (axis "rows") or inputs ("columns") are scaled."""

    module: str
    axis: str
    dtype: str
    parameters: int


@dataclass(frozen=True, slots=True)
class ReplacedSummary:
    """A tensor of the base that the adapter brings anew, or `rows` of one."""

    name: str
    role: Role
    shape: tuple[int, ...]
    dtype: str
    parameters: int
    rows: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Summary:
    """An adapter and, where it has a manifest, what that says.

    Attributes:
        name: namespace/name and version; None for a bare directory.
        base: the author's name of the base, a hint; None where nothing says.
        base_root: fingerprint of the base; None for a bare directory.
        rule: of all scalings; None where nothing is scaled by alpha and rank.
        frobenius: norm over all deltas together; None where it is not finite.
        alora_tokens: it acts from their last occurrence on; empty where it acts always.
        ties_weights: whether its update of the embedding is meant for the head too.
    """

    name: str | None
    version: str | None
    summary: str | None
    license: str | None
    task: str | None
    base: str | None
    base_root: str | None
    rule: ScalingRule | None
    parameters: int
    size_bytes: int
    frobenius: float | None
    modules: tuple[ModuleSummary, ...]
    scaled: tuple[ScaledSummary, ...] = ()
    replaced: tuple[ReplacedSummary, ...] = ()
    alora_tokens: tuple[int, ...] = ()
    ties_weights: bool = False


def summarize(source: AdapterSource, manifest: Manifest | None = None) -> Summary:
    """Return the summary of an adapter; reads every factor once."""
    modules = tuple(map(_module, source.updates, figures_of(source)))
    scaled = tuple(map(_scaled, source.scales))
    replaced = tuple(map(_replaced, source.replacements))
    hints = manifest.base.hints if manifest else ()
    return Summary(
        name=manifest.name if manifest else None,
        version=manifest.version if manifest else None,
        summary=manifest.summary if manifest else None,
        license=manifest.license if manifest else None,
        task=manifest.task.id if manifest else None,
        base=f"{hints[0].hub}:{hints[0].repo}" if hints else source.base_name,
        base_root=manifest.base.root if manifest else None,
        rule=source.updates[0].rule if source.updates else None,
        parameters=_total(modules) + _total(scaled) + _total(replaced),
        size_bytes=source.tensors.header.file_size,
        frobenius=_together([module.frobenius for module in modules]),
        modules=modules,
        scaled=scaled,
        replaced=replaced,
        alora_tokens=source.alora_tokens,
        ties_weights=source.ties_weights,
    )


def _module(update: UpdateSource, figures: Figures) -> ModuleSummary:
    shape = weight_shape(
        update.layer, update.rank, update.a.shape, update.b.shape, is_transposed=False
    )
    return ModuleSummary(
        module=update.target,
        rank=update.rank,
        alpha=update.alpha,
        scaling=update.scaling,
        dtype=update.a.dtype,
        shape=shape or (update.b.shape[0], update.a.shape[1]),
        parameters=sum(tensor.elements for tensor in update.tensors),
        frobenius=figures.frobenius,
        layer=update.layer,
        is_dora=update.magnitude is not None,
        has_bias=update.bias is not None,
    )


def _scaled(scales: ScaleSource) -> ScaledSummary:
    vector = scales.vector
    return ScaledSummary(scales.target, scales.axis, vector.dtype, vector.elements)


def _replaced(replaced: Replacement) -> ReplacedSummary:
    return ReplacedSummary(
        name=replaced.name,
        role=replaced.role,
        shape=replaced.tensor.shape,
        dtype=replaced.tensor.dtype,
        parameters=replaced.tensor.elements,
        rows=replaced.rows,
    )


def _total(
    parts: Sequence[ModuleSummary] | Sequence[ScaledSummary] | Sequence[ReplacedSummary],
) -> int:
    return sum(part.parameters for part in parts)


def _together(norms: Sequence[float | None]) -> float | None:
    finite = [norm for norm in norms if norm is not None]
    return math.hypot(*finite) if len(finite) == len(norms) else None
