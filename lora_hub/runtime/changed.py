"""What merging adapters would make of a model's tensors, decided before one is touched.

Each tensor of the model gets what the adapters exchange it for and the updates that act on
it, as `adapter/merged_rows.py` sums them. A tensor with several uses, as an embedding and
its head, is merged once, and only if all its uses would change alike; or each use gets a
tensor of its own (`untie`).

Two things have no place in a weight and are left to act on outputs as they did: a bias for
a layer that has none, and what factors do to a convolution of several groups, since they
see the channels of all groups and its weight does not.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_hub.adapter.adapter import Replaced
from lora_hub.adapter.merged_rows import Term, of_bias
from lora_hub.adapter.update import Update
from lora_hub.errors import ComposeError, FitError, InputError
from lora_hub.runtime.dtypes import COMPUTES
from lora_hub.runtime.prepare import Aimed, Prepared
from lora_hub.runtime.resident import Key
from lora_hub.runtime.sharing import Address, Sharing, Use, address_of, is_plain


class Acting(NamedTuple):
    """An adapter that acts: its name, ready for the model, with its weight."""

    name: str
    prepared: Prepared
    weight: float
    tokens: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Exchange:
    """What one adapter brings for a tensor, or for rows of it."""

    part: int
    weight: float
    replaced: Replaced


@dataclass(frozen=True, slots=True, eq=False)
class Changed:
    """One tensor, and all that becomes of it.

    Attributes:
        uses: where it stands, the first of which names it.
        tensor: as it is.
        exchanges: come first, in the order of the adapters.
        terms: act on what was exchanged.
        is_split: whether these uses get a tensor of their own, since others do not change
            as they do.
    """

    uses: tuple[Use, ...]
    tensor: Tensor
    exchanges: tuple[Exchange, ...] = ()
    terms: tuple[Term, ...] = ()
    is_split: bool = False

    @property
    def name(self) -> str:
        return self.uses[0].full


@dataclass(frozen=True, slots=True)
class Changes:
    """All that a merge would do.

    Attributes:
        tensors: what changes.
        left: adapters with what of them has no place in a weight, to act as before.
        notes: what a person should hear.
    """

    tensors: tuple[Changed, ...]
    left: tuple[Acting, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """The bytes of what is written to in place."""
        return sum(each.tensor.nbytes for each in self.tensors if not each.is_split)


def changes(
    model: nn.Module,
    acting: Iterable[tuple[str, Prepared, float] | Acting],
    *,
    untie: bool = False,
) -> Changes:
    """Return what merging these adapters would do to the model; nothing is done.

    Args:
        model: the adapters were prepared for it.
        acting: in the order in which they are summed. DoRA is resolved in them already,
            against weights to which nothing was merged.
        untie: whether a tensor whose uses change unlike becomes several.

    Raises:
        InputError: a weight is no finite number.
        ComposeError: an aLoRA, which no weight can tell; or a tensor of whole numbers
            would be weighted.
        FitError: a tensor is not held as plain floating-point numbers in memory, or shares
            them with one that would not change as it does.
    """
    parts = [each for each in (Acting(*one) for one in acting) if each.weight]
    for each in parts:
        _check_part(each)
    asked = _asked(parts)
    left = _left(parts, asked)
    sharing = Sharing(model)
    found: list[Changed] = []
    notes: list[str] = []
    seen: set[Address] = set()
    for key, ask in asked.items():
        if not (ask.exchanges or ask.updates):
            continue
        tensor = _tensor(key, ask)
        address = address_of(tensor)
        if address in seen:
            continue
        seen.add(address)
        uses = sharing.uses(tensor) or (Use(ask.name, *key),)
        classes = _alike(uses, asked)
        if len(classes) > 1:
            if not untie:
                raise _tied(uses, parts)
            notes.append(
                f"{' and '.join(use.full for use in uses)} are no longer one tensor, until "
                "the merge is taken back; the model's config still says that they are"
            )
        if sharing.overlaps(tensor):
            raise FitError(
                "shares its memory with another tensor of the model, which merging would "
                "change along",
                where=uses[0].full,
                hint="attach the adapter instead",
            )
        keeps = next((each for each in classes if not _asks(each, asked)), classes[0])
        classes.sort(key=lambda each: each is keeps)  # last: the others read the tensor
        found += [
            Changed(
                each,
                tensor,
                tuple(asked[each[0].module, each[0].name].exchanges),
                tuple(_terms(asked[each[0].module, each[0].name], parts, tensor)),
                is_split=each is not keeps,
            )
            for each in classes
            if _asks(each, asked)
        ]
    notes += [f"{target} keeps acting on the layer's output" for target in _targets(left)]
    return Changes(tuple(found), left, tuple(notes))


@dataclass(slots=True)
class _Asked:
    """What is asked of one tensor, each with the index of its adapter."""

    name: str
    exchanges: list[Exchange] = field(default_factory=list)
    updates: list[tuple[int, Update, bool]] = field(default_factory=list)


def _check_part(part: Acting) -> None:
    if part.tokens:
        raise ComposeError(
            "an aLoRA acts only behind its invocation tokens, which weights cannot tell",
            where=part.name,
            hint="use the adapter without merging it",
        )
    if not isfinite(part.weight):
        raise InputError(
            f"the weight is {part.weight!r}, expected a finite number", where=part.name
        )


def _asked(parts: Sequence[Acting]) -> dict[Key, _Asked]:
    """Return what the adapters ask of each tensor."""
    asked: dict[Key, _Asked] = {}

    def of(key: Key, name: str) -> _Asked:
        return asked.setdefault(key, _Asked(name))

    for index, part in enumerate(parts):
        for name, (place, new) in part.prepared.replaced.items():
            exchange = Exchange(index, part.weight, new)
            of((place.module, place.name), name).exchanges.append(exchange)
        for target, aimed in part.prepared.updates.items():
            place, update = aimed.place, aimed.update
            name = target if update.layer == "experts" else f"{target}.{place.name}"
            if update.rank or update.p is not None or update.q is not None:
                one = (index, update, place.is_transposed)
                of((place.module, place.name), name).updates.append(one)
            if _bias_of(place.module) is not None and (
                update.bias is not None or update.bias_scale is not None
            ):
                one = (index, of_bias(update), False)
                of((place.module, "bias"), f"{target}.bias").updates.append(one)
    return asked


def _left(parts: Sequence[Acting], asked: Mapping[Key, _Asked]) -> tuple[Acting, ...]:
    """Return what has no place in weights, and take it out of what is asked of them."""
    grouped = {
        (module, name)
        for (module, name), ask in asked.items()
        if name == "weight"
        and isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        and module.groups > 1
        and any(update.rank or update.q is not None for _, update, _ in ask.updates)
    }
    for key in grouped:
        if asked[key].exchanges:
            raise FitError(
                "the layer is a convolution of several groups, whose weight is replaced "
                "and also changed by factors, which cannot be merged into it",
                where=asked[key].name,
                hint="use the adapters without merging them",
            )
        asked[key].updates.clear()
    left = []
    for part in parts:
        kept: dict[str, Aimed] = {}
        for target, aimed in part.prepared.updates.items():
            update, module = aimed.update, aimed.place.module
            has_bias = _bias_of(module) is not None
            is_grouped = (module, aimed.place.name) in grouped
            if has_bias:
                update = replace(update, bias=None, bias_scale=None)
            if is_grouped or update.bias is not None:
                rest = update if is_grouped else _of_bias_alone(update)
                kept[target] = replace(aimed, update=rest)
        if kept:
            alone = replace(part.prepared, updates=kept, replaced={})
            left.append(part._replace(prepared=alone))
    return tuple(left)


def _of_bias_alone(update: Update) -> Update:
    """Return the update without all that acts on the weight."""
    return replace(
        update,
        a=update.a[..., :0, :],
        b=update.b[..., :0],
        scaling=update.scaling[:0],
        p=None,
        q=None,
        bias_scale=None,
    )


def _bias_of(module: nn.Module) -> Tensor | None:
    bias = getattr(module, "bias", None)
    return bias if isinstance(bias, Tensor) else None


def _targets(left: Iterable[Acting]) -> Iterator[str]:
    for part in left:
        for target, aimed in part.prepared.updates.items():
            what = "a convolution of several groups" if aimed.update.rank else "a bias"
            yield f"{target} of {part.name} ({what})"


def _tensor(key: Key, ask: _Asked) -> Tensor:
    """Return the tensor, which is one that can be summed.

    Raises:
        FitError, ComposeError: it is none.
    """
    home = Use(ask.name, *key).home
    tensor = home.get(key[1])
    if tensor is None:
        raise FitError(
            "is computed by the layer when it is asked for, so there is no tensor to merge "
            "into",
            where=ask.name,
            hint="take the parametrization off, or use the adapter without merging it",
        )
    if tensor.is_meta:
        raise FitError(
            "the numbers of the tensor are not in memory",
            where=ask.name,
            hint="load the model whole, or use the adapter without merging it",
        )
    if not is_plain(tensor) or (
        tensor.dtype not in COMPUTES and (ask.updates or tensor.is_floating_point())
    ):
        raise FitError(
            f"the weight is held as {_kind(tensor)}, to which no change can be added",
            where=ask.name,
            hint="load the model in bfloat16 or float32, or use the adapter without "
            "merging it",
        )
    if tensor.dtype not in COMPUTES and [each.weight for each in ask.exchanges] != [1]:
        raise ComposeError(
            f"a replaced tensor of {tensor.dtype} has no weighted sum",
            where=ask.name,
            hint="use the adapter alone, with weight 1",
        )
    return tensor


def _kind(tensor: Tensor) -> str:
    if is_plain(tensor):
        return str(tensor.dtype)
    return f"a {type(tensor.data).__name__} of {tensor.dtype}"


def _terms(ask: _Asked, parts: Sequence[Acting], tensor: Tensor) -> Iterator[Term]:
    for index, update, is_transposed in ask.updates:
        # A single expert's weight is (out, in) always, as PEFT has it.
        is_single = update.layer == "experts" and tensor.dim() == 2
        if is_single:
            update = replace(update, a=update.a[0], b=update.b[0])  # noqa: PLW2901
        turned = is_transposed and not is_single
        yield Term(index, parts[index].weight, update, turned)


def _alike(uses: Sequence[Use], asked: Mapping[Key, _Asked]) -> list[tuple[Use, ...]]:
    """Return the uses of a tensor, those side by side that would change alike."""
    classes: list[list[Use]] = []
    for use in uses:
        own = asked.get((use.module, use.name))
        for known in classes:
            if _are_equal(own, asked.get((known[0].module, known[0].name))):
                known.append(use)
                break
        else:
            classes.append([use])
    return [tuple(each) for each in classes]


def _asks(uses: Sequence[Use], asked: Mapping[Key, _Asked]) -> bool:
    ask = asked.get((uses[0].module, uses[0].name))
    return ask is not None and bool(ask.exchanges or ask.updates)


def _are_equal(one: _Asked | None, other: _Asked | None) -> bool:
    """Return whether two uses of a tensor would change alike, number by number."""
    one, other = one or _Asked(""), other or _Asked("")
    return (
        len(one.exchanges) == len(other.exchanges)
        and len(one.updates) == len(other.updates)
        and all(map(_is_same_exchange, one.exchanges, other.exchanges))
        and all(map(_is_same_update, one.updates, other.updates))
    )


def _is_same_exchange(one: Exchange, other: Exchange) -> bool:
    return (
        one.part == other.part
        and one.replaced.rows == other.replaced.rows
        and _is_same(one.replaced.tensor, other.replaced.tensor)
    )


def _is_same_update(one: tuple[int, Update, bool], other: tuple[int, Update, bool]) -> bool:
    return one[0] == other[0] and all(map(_is_same, _as_stored(*one), _as_stored(*other)))


def _as_stored(part: int, update: Update, is_transposed: bool) -> tuple[Tensor | None, ...]:
    """Return the factors, scalings, p and q of the tensor as it is stored."""
    a, b, p, q = update.a, update.b, update.p, update.q
    if is_transposed:
        a, b, p, q = b.mT, a.mT, q, p
    return a, b, update.scaling, p, q


def _is_same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one is other or (one.dtype == other.dtype and torch.equal(one, other))


def _tied(uses: Sequence[Use], parts: Sequence[Acting]) -> FitError:
    return FitError(
        f"{' and '.join(use.full for use in uses)} are one tensor; merging would change "
        f"all alike, {' and '.join(part.name for part in parts)} would not",
        where=uses[0].full,
        hint="merge with untie=True, which gives each a tensor of its own until unmerge, "
        "or use the adapters without merging them",
    )
