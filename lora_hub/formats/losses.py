"""What of an adapter lies beyond a dialect: everything that its format has no place for.

Each writer asks `beyond` first, so that no part of an adapter is dropped in silence. What
depends on numbers (alphas, ranks, dtypes), a dialect's own file knows.
"""

from collections.abc import Callable, Collection, Mapping

from lora_hub.formats.dialect import FEATURES
from lora_hub.formats.factors import some
from lora_hub.formats.source import AdapterSource, UpdateSource


def _updates(
    is_meant: Callable[[UpdateSource], bool],
) -> Callable[[AdapterSource], list[str]]:
    return lambda source: sorted({u.target for u in source.updates if is_meant(u)})


# feature → where an adapter needs it
_NEEDS: Mapping[str, Callable[[AdapterSource], list[str]]] = {
    "embeddings": _updates(lambda update: update.layer == "embedding"),
    "convolutions": _updates(lambda update: update.layer == "conv"),
    "experts": _updates(lambda update: update.layer == "experts"),
    "dora": _updates(lambda update: update.magnitude is not None),
    "lora_bias": _updates(lambda update: update.bias is not None),
    "replaced": lambda source: [r.name for r in source.replacements if r.rows is None],
    "rows": lambda source: [r.name for r in source.replacements if r.rows is not None],
    "scales": lambda source: [scale.target for scale in source.scales],
    "alora": lambda source: [str(token) for token in source.alora_tokens],
    "ties": lambda source: ["all targets"] if source.ties_weights else [],
}


def beyond(source: AdapterSource, says: Collection[str]) -> list[str]:
    """Return what a dialect saying these features has no place for, a sentence each."""
    return [
        f"{FEATURES[feature]}: {some(found)}"
        for feature, needs in _NEEDS.items()
        if feature not in says and (found := needs(source))
    ]


def partly(source: AdapterSource, feature: str) -> list[str]:
    """Return a loss where a feature that holds for all targets or none holds for some."""
    count = len(_NEEDS[feature](source))
    if count in (0, len(source.updates)):
        return []
    return [f"{FEATURES[feature]} for all targets or none, {count} have one"]
