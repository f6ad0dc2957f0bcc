"""What the packer derives from the adapter itself, so that no author can misstate it.

The same functions check a package: what they give for its files must be what its
manifest says.
"""

from collections.abc import Sequence
from math import prod

from lora_hub.formats.source import AdapterSource
from lora_hub.manifest.document import (
    AdapterInfo,
    AdapterSummary,
    ExtraTensor,
    Module,
)


def adapter_of(source: AdapterSource) -> AdapterInfo:
    """Return all that a manifest says about an adapter; it has one update or more."""
    modules, extra = modules_of(source), extra_tensors_of(source)
    return AdapterInfo(
        format="peft-safetensors",
        modules=modules,
        extra_tensors=extra,
        summary=summary_of(modules, extra),
        alora_invocation_tokens=source.alora_tokens,
        ties_weights=source.ties_weights,
    )


def modules_of(source: AdapterSource) -> tuple[Module, ...]:
    """Return each target with its own rank, alpha and shapes, in order of names."""
    return tuple(
        Module(
            module=update.target,
            rank=update.rank,
            alpha=update.alpha,
            scaling=update.rule,
            dtype=update.a.dtype,
            a=update.a.shape,
            b=update.b.shape,
            bias=update.bias is not None,
            layer=update.layer,
            magnitude=update.magnitude is not None,
            layout="a expert-major, b rank-major" if update.layer == "experts" else None,
            experts=update.experts if update.layer == "experts" else None,
        )
        for update in sorted(source.updates, key=lambda update: update.target)
    )


def extra_tensors_of(source: AdapterSource) -> tuple[ExtraTensor, ...]:
    """Return what the adapter brings beside its updates, in order of names."""
    return tuple(
        ExtraTensor(
            name=replaced.name,
            role=replaced.role,
            shape=replaced.tensor.shape,
            dtype=replaced.tensor.dtype,
            rows=replaced.rows,
        )
        for replaced in sorted(source.replacements, key=lambda one: one.name)
    )


def summary_of(
    modules: Sequence[Module], extra: Sequence[ExtraTensor] = ()
) -> AdapterSummary:
    """Return the facets for search."""
    ranks = sorted({module.rank for module in modules})
    return AdapterSummary(
        max_rank=ranks[-1],
        ranks=tuple(ranks),
        parameters=sum(map(_parameters, modules)) + sum(prod(one.shape) for one in extra),
        target_names=tuple(sorted({_last_part(module.module) for module in modules})),
        layers=len({_layer(module.module) for module in modules}),
    )


def kind_of(modules: Sequence[Module], extra: Sequence[ExtraTensor] = ()) -> str:
    """Return the manifest's `kind`: how the weights change, and what else comes along."""
    is_dora = any(module.magnitude for module in modules)
    is_rslora = modules[0].scaling == "alpha/sqrt(r)"
    parts = ["dora" if is_dora else "rslora" if is_rslora else "lora"]
    roles = {one.role for one in extra}
    if roles - {"token_delta"}:
        parts.append("modules")
    if "token_delta" in roles:
        parts.append("tokens")
    return "+".join(parts)


def _parameters(module: Module) -> int:
    # A magnitude and a bias have one number for each output.
    vectors = (module.magnitude + module.bias) * module.b[0]
    return prod(module.a) + prod(module.b) + vectors


def _last_part(target: str) -> str:
    """Return what a target is called within its layer: q_proj."""
    return target.rpartition(".")[2]


def _layer(target: str) -> str:
    """Return the path up to the first number: `model.layers.3`; a target without is one."""
    parts = target.split(".")
    for index, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: index + 1])
    return target
