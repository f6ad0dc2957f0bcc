"""Updates of zeros where an engine must find some: they change nothing.

SGLang fuses q, k and v into one module, and gate and up into another, and takes an adapter
to have all of them. LoRAX drops a kind of module that any layer of the model is without.
How large the zeros are is told by the modules beside them, or by the base.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from lora_hub.formats.engines.base import Modules
from lora_hub.formats.engines.refused import refusal
from lora_hub.formats.engines.table import Engine
from lora_hub.formats.factors import Factors, some
from lora_hub.formats.fold import zeros

# A target in a layer: what stands before the number, the number, and the kind of module.
_IN_LAYER = re.compile(r"(.*\b(?:layers|blocks|h))\.(\d+)\.(.+)")

# Kinds of a group that have one shape: k and v have as many heads, gate and up one width.
_ALIKE = {
    "k_proj": "v_proj",
    "v_proj": "k_proj",
    "gate_proj": "up_proj",
    "up_proj": "gate_proj",
}

_SAY_BASE = "give the base's folder with --base: it tells which modules there are"


def with_zero_updates(
    parts: Sequence[Factors], engine: Engine, base: Modules | None
) -> tuple[tuple[Factors, ...], tuple[str, ...]]:
    """Return the updates with those of zeros, and what was done, a sentence each.

    Raises:
        LossyConversion: what would have to be added is not known without the base, or is
            not in it.
    """
    found = {part.target: part for part in parts}
    added: list[Factors] = []
    for group in engine.groups:
        added += _grouped(found, group, engine, base)
    notes: list[str] = []
    if engine.needs_every_layer:
        more, notes = _layered(found, engine, base)
        added += more
    if added:
        names = some(sorted(part.target for part in added))
        notes.insert(
            0,
            f"{engine.title} needs updates of {names}; the adapter leaves these alone, so "
            "they are zeros",
        )
    every = sorted((*parts, *added), key=lambda part: part.target)
    return tuple(every), tuple(notes)


# ── modules side by side ─────────────────────────────────────────────────────────────


def _grouped(
    found: dict[str, Factors], group: Sequence[str], engine: Engine, base: Modules | None
) -> list[Factors]:
    """Return zeros for the modules of a group of which the adapter has others."""
    parents = {
        parent: None
        for parent, dot, kind in (target.rpartition(".") for target in found)
        if dot and kind in group
    }
    added = []
    for parent in parents:
        present = [kind for kind in group if f"{parent}.{kind}" in found]
        for kind in group:
            if kind in present:
                continue
            target = f"{parent}.{kind}"
            out = _out_features(target, kind, parent, found, engine, base)
            added.append(_zero(target, found[f"{parent}.{present[0]}"], out))
    return added


def _out_features(
    target: str,
    kind: str,
    parent: str,
    found: dict[str, Factors],
    engine: Engine,
    base: Modules | None,
) -> int:
    if base is not None:
        if target not in base.shapes:
            raise refusal(
                engine,
                f"{engine.title} fuses {target} with the modules beside it, and the base "
                "has none of that name",
            )
        return base.shapes[target][0]
    alike = found.get(f"{parent}.{_ALIKE[kind]}") if kind in _ALIKE else None
    # `up` may stand without any `gate` in the model; the others never stand alone.
    is_sure = kind != "gate_proj" or any(name.endswith(".gate_proj") for name in found)
    if alike is None or not is_sure:
        raise refusal(
            engine,
            f"{engine.title} fuses {target} with the modules beside it, and the adapter "
            "leaves it alone",
            hint=_SAY_BASE,
        )
    return alike.b.shape[0]


# ── every layer ──────────────────────────────────────────────────────────────────────


def _layered(
    found: dict[str, Factors], engine: Engine, base: Modules | None
) -> tuple[list[Factors], list[str]]:
    """Return zeros for the layers in which a kind of module is not adapted, and notes."""
    kinds: dict[tuple[str, str], dict[int, Factors]] = {}
    for target, part in found.items():
        match = _IN_LAYER.fullmatch(target)
        if match:
            kinds.setdefault((match[1], match[3]), {})[int(match[2])] = part
    if not kinds:
        return [], []
    if base is None:
        count = 1 + max(layer for layers in kinds.values() for layer in layers)
        layers_of: Mapping[tuple[str, str], Sequence[int]] = dict.fromkeys(
            kinds, range(count)
        )
        note = (
            f"{engine.title} applies nothing to a base of more than {count} layers, and "
            "says nothing: --base makes sure"
        )
    else:
        layers_of = {kind: _layers(kind, base.shapes) for kind in kinds}
        note = ""
    added = []
    for kind, layers in kinds.items():
        shapes = {(part.b.shape[0], part.a.shape[1]) for part in layers.values()}
        like = next(iter(layers.values()))
        for layer in layers_of[kind]:
            if layer in layers:
                continue
            target = f"{kind[0]}.{layer}.{kind[1]}"
            if base is None and len(shapes) > 1:
                raise refusal(
                    engine,
                    f"{engine.title} needs {target}, whose shape differs from layer to "
                    "layer",
                    hint=_SAY_BASE,
                )
            # The base's shape only where others do not tell: it may be stored transposed.
            by_name = {} if base is None or len(shapes) == 1 else base.shapes
            out, inp = by_name.get(target) or next(iter(shapes))
            added.append(_zero(target, like, out, inp))
    return added, [note] if note else []


def _layers(kind: tuple[str, str], names: Iterable[str]) -> Sequence[int]:
    found = []
    for name in names:
        match = _IN_LAYER.fullmatch(name)
        if match and (match[1], match[3]) == kind:
            found.append(int(match[2]))
    return sorted(found)


def _zero(target: str, like: Factors, out: int, inp: int | None = None) -> Factors:
    """Return an update of zeros with the rank, scaling and dtype of another."""
    columns = like.a.shape[1] if inp is None else inp
    return replace(
        like,
        target=target,
        a=zeros(like.a.dtype, (like.rank, columns)),
        b=zeros(like.b.dtype, (out, like.rank)),
    )
