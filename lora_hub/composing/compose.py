"""Adapters and weights → one adapter. The result can be composed, saved, merged, attached.

This file checks that the adapters belong together and goes from target to target; what
happens at one target is the matter of a method (`methods.py`).
"""

import math
from collections.abc import Iterable, Sequence

import msgspec

from lora_hub.adapter.adapter import Adapter, Parent
from lora_hub.adapter.update import Update
from lora_hub.composing.agree import disagreement
from lora_hub.composing.linear import Term
from lora_hub.composing.methods import METHODS, Method
from lora_hub.composing.replaced import replaced_of
from lora_hub.errors import ComposeError
from lora_hub.manifest.document import Base, Policy

Part = tuple[Adapter, float]  # an adapter and its weight

# From the strictest to the loosest.
_POLICIES: tuple[Policy, ...] = ("exact", "targets", "struct")


def compose(
    parts: Sequence[Part], method: str = "linear", *, name: str | None = None
) -> Adapter:
    """Return one adapter that does what the parts do together.

    Targets are the union of the parts' targets; at a target that only one part has, that
    part's update is taken times its weight. The base is the one that all parts with an
    identified base share; a part without one says nothing about it.

    Args:
        parts: adapters and finite weights, of any ranks and signs.
        method: a name in `METHODS`.
        name: what to call the result.

    Raises:
        ComposeError: no parts, an unknown method, a weight that is not finite, adapters of
            different bases, a target whose layers or shapes disagree; a sum that depends on
            the base's weights: of a DoRA update that is not alone with weight 1, of
            replaced tensors (`replaced.py`); or adapters that act on other tokens.
    """
    chosen = _method(method)
    _check_weights(parts)
    base = _common_base(parts)
    return Adapter(
        updates={
            target: _combined(target, parts, chosen)
            for target in sorted(
                {target for adapter, _ in parts for target in adapter.updates}
            )
        },
        name=name,
        base=base,
        base_name=_agreed(adapter.base_name for adapter, _ in parts),
        task_type=_agreed(adapter.task_type for adapter, _ in parts),
        parents=tuple(
            Parent(adapter.name, adapter.digest, float(weight)) for adapter, weight in parts
        ),
        replaced=replaced_of(parts),
        alora_tokens=_common_tokens(parts),
        ties_weights=_common_ties(parts),
    )


def _method(name: str) -> Method:
    try:
        return METHODS[name]
    except KeyError:
        raise ComposeError(
            f"{name!r} is no method of composing", hint=f"methods: {', '.join(METHODS)}"
        ) from None


def _check_weights(parts: Sequence[Part]) -> None:
    if not parts:
        raise ComposeError(
            "there is nothing to compose", hint="name at least one adapter and its weight"
        )
    for index, (adapter, weight) in enumerate(parts):
        if not math.isfinite(weight):
            raise ComposeError(
                f"the weight is {weight}, expected a finite number",
                where=_called(adapter, index),
            )


def _combined(target: str, parts: Sequence[Part], method: Method) -> Update:
    terms: list[Term] = []
    names: list[str] = []
    for index, (adapter, weight) in enumerate(parts):
        update = adapter.updates.get(target)
        if update is None:
            continue
        names.append(_called(adapter, index))
        for (other, _), called in zip(terms, names, strict=False):
            different = disagreement(other, update)
            if different is not None:
                raise ComposeError(
                    f"{called} changes {different[0]}, {names[-1]} {different[1]}",
                    where=target,
                    hint="these adapters were made for different bases",
                )
        terms.append((update, float(weight)))
    for (update, weight), called in zip(terms, names, strict=True):
        if update.magnitude is not None and (len(terms) > 1 or weight != 1):
            raise ComposeError(
                f"{called} is a DoRA adapter, whose weighted sum needs the base's weight",
                where=target,
                hint="attach the adapters together, or merge them into the base together",
            )
    return method.function(terms)


def _common_tokens(parts: Sequence[Part]) -> tuple[int, ...]:
    """Return the invocation tokens from which all parts act; empty where all act always."""
    first = parts[0][0].alora_tokens
    for index, (adapter, _) in enumerate(parts[1:], start=1):
        if adapter.alora_tokens != first:
            raise ComposeError(
                f"{_called(parts[0][0], 0)} acts {_when(first)}, "
                f"{_called(adapter, index)} {_when(adapter.alora_tokens)}",
                hint="adapters that act on the same tokens can be composed",
            )
    return first


def _when(tokens: tuple[int, ...]) -> str:
    return f"from its invocation tokens {list(tokens)} on" if tokens else "on every token"


def _common_ties(parts: Sequence[Part]) -> bool:
    """Return whether changes of the input embedding are the output embedding's too."""
    heads = {shape for adapter, _ in parts for shape in _heads(adapter)}
    concerned = [
        (_called(adapter, index), adapter.ties_weights)
        for index, (adapter, _) in enumerate(parts)
        if adapter.replaced
        or any(
            update.layer == "embedding"
            or (update.layer == "linear" and update.shape in heads)
            for update in adapter.updates.values()
        )
    ]
    tied = [name for name, ties in concerned if ties]
    loose = [name for name, ties in concerned if not ties]
    if tied and loose:
        raise ComposeError(
            f"{tied[0]} changes the output embedding with the input embedding, {loose[0]} "
            "does not",
            hint="attach the adapters together, or merge them into the base together",
        )
    return bool(tied)


def _heads(adapter: Adapter) -> set[tuple[int, ...]]:
    """Return the shapes that an output embedding changed with the input embedding has.

    Which layer that is, only the model knows: one of this shape may be it.
    """
    if not adapter.ties_weights:
        return set()
    embeddings = [each for each in adapter.updates.values() if each.layer == "embedding"]
    return {update.shape[::-1] for update in embeddings}


def _common_base(parts: Sequence[Part]) -> Base | None:
    """Return the shared base with the targets of all parts and the strictest policy."""
    known = [
        (_called(adapter, index), adapter.base)
        for index, (adapter, _) in enumerate(parts)
        if adapter.base is not None
    ]
    if not known:
        return None
    first_name, first = known[0]
    for name, base in known[1:]:
        if base.root != first.root:
            raise ComposeError(
                f"{first_name} was made for base {first.root}, {name} for {base.root}",
                hint="adapters of one base can be composed; see `lorahub inspect`",
            )
    targets = {
        (target.module, target.tensor or ""): target
        for _, base in known
        for target in base.targets
    }
    return msgspec.structs.replace(
        first,
        targets=tuple(targets[key] for key in sorted(targets)),
        variants=tuple(
            variant
            for variant in first.variants
            if all(variant in base.variants for _, base in known)
        ),
        policy=min((base.policy for _, base in known), key=_POLICIES.index),
    )


def _agreed(values: Iterable[str | None]) -> str | None:
    distinct = set(values)
    return distinct.pop() if len(distinct) == 1 else None


def _called(adapter: Adapter, index: int) -> str:
    return adapter.name or f"adapter {index + 1}"
