"""What the packer derives from the adapter itself, so that no author can misstate it.

The same functions check a package: what they give for its files must be what its
manifest says.
"""

from collections.abc import Sequence

from lora_hub.formats.source import AdapterSource
from lora_hub.manifest.document import AdapterSummary, Module


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
        )
        for update in sorted(source.updates, key=lambda update: update.target)
    )


def summary_of(modules: Sequence[Module]) -> AdapterSummary:
    """Return the facets for search."""
    ranks = sorted({module.rank for module in modules})
    return AdapterSummary(
        max_rank=ranks[-1],
        ranks=tuple(ranks),
        parameters=sum(
            module.a[0] * module.a[1] + module.b[0] * module.b[1] for module in modules
        ),
        target_names=tuple(sorted({_last_part(module.module) for module in modules})),
        layers=len({_layer(module.module) for module in modules}),
    )


def kind_of(modules: Sequence[Module]) -> str:
    """Return the manifest's `kind`."""
    return "rslora" if modules[0].scaling == "alpha/sqrt(r)" else "lora"


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
