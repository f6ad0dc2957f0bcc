"""What an adapter asks for that an engine does not compute, each with where.

Refused is what no rewriting can help: the way out is to merge.
"""

from collections.abc import Callable, Mapping

from lora_hub.errors import LossyConversion
from lora_hub.formats.base_names import of_component
from lora_hub.formats.engines.table import Engine
from lora_hub.formats.factors import some
from lora_hub.formats.source import AdapterSource

_WAY_OUT = (
    "nothing was written; merge the adapter into its base and serve that (`lorahub "
    "merge`); docs/engines.md tells what each engine reads"
)

Finder = Callable[[AdapterSource], list[str]]


def _layers(layer: str) -> Finder:
    return lambda source: [
        update.target for update in source.updates if update.layer == layer
    ]


def _roles(role: str) -> Finder:
    return lambda source: [each.name for each in source.replacements if each.role == role]


# name → in words, and where an adapter asks for it
FEATURES: Mapping[str, tuple[str, Finder]] = {
    "alora": (
        "an adapter that acts from its invocation tokens on (aLoRA)",
        lambda source: (
            ["the tokens are " + " ".join(map(str, source.alora_tokens))]
            if source.alora_tokens
            else []
        ),
    ),
    "bias": ("trained biases of the base", _roles("bias")),
    "components": (
        "targets in components of a pipeline",
        lambda source: [
            update.target for update in source.updates if of_component(update.target)[0]
        ],
    ),
    "conv": ("updates of convolutions", _layers("conv")),
    "dora": (
        "DoRA",
        lambda source: [each.target for each in source.updates if each.magnitude],
    ),
    "embedding": ("updates of embeddings", _layers("embedding")),
    "embedding weights": (
        "a whole embedding beside the factors, unless --base shows it to be the base's own",
        _roles("embedding"),
    ),
    "experts": ("updates of experts", _layers("experts")),
    "ia3": ("scales (IA3)", lambda source: [each.target for each in source.scales]),
    "lora_bias": (
        "biases beside the factors (lora_bias)",
        lambda source: [each.target for each in source.updates if each.bias],
    ),
    "modules_to_save": ("modules trained whole", _roles("modules_to_save")),
    "tied": (
        "an update of two tied embeddings (ensure_weight_tying)",
        lambda source: ["the adapter says so"] if source.ties_weights else [],
    ),
    "token rows": ("trained rows of an embedding", _roles("token_delta")),
}


def losses(source: AdapterSource, engine: Engine) -> tuple[str, ...]:
    """Return everything in the adapter that the engine cannot, a sentence each."""
    found = []
    for name, (words, find) in FEATURES.items():
        places = find(source)
        if places and name in engine.cannot:
            found.append(f"{engine.title} {engine.cannot[name]}: {words} ({some(places)})")
    others = [
        update.target
        for update in source.updates
        if update.layer == "embedding"
        and "embedding" not in engine.cannot
        and update.target.rpartition(".")[2] not in engine.embeddings
    ]
    if others:
        known = ", ".join(sorted(engine.embeddings))
        found.append(
            f"{engine.title} knows no embedding but {known}: updates of {some(others)}"
        )
    if not source.updates:
        found.append(f"{engine.title} has nothing to apply: the adapter has no factors")
    return tuple(found)


def check(source: AdapterSource, engine: Engine) -> None:
    """Raise `LossyConversion` where the engine cannot compute the adapter."""
    found = losses(source, engine)
    if found:
        raise refusal(engine, *found)


def refusal(engine: Engine, *found: str, hint: str = _WAY_OUT) -> LossyConversion:
    """Return the error that says what cannot be done for the engine."""
    return LossyConversion(
        f"{engine.title} would not compute this adapter: {'; '.join(found)}",
        losses=found,
        hint=hint,
    )
