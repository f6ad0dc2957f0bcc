"""An adapter made ready for one model: every place found, DoRA resolved, ties followed.

What is decided here does not depend on which adapters act or with what weight. What comes
out still holds the adapter's own tensors; `slab.py` brings their numbers beside the layers.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float64, Shaped
from torch import Tensor, nn

from lora_hub.adapter.adapter import Adapter, Replaced
from lora_hub.adapter.layout import to_matrix
from lora_hub.adapter.resolve import norms_of, with_norms
from lora_hub.adapter.update import Update
from lora_hub.errors import FitError
from lora_hub.runtime.alike import Alike, Structures, structure_of
from lora_hub.runtime.dtypes import COMPUTES
from lora_hub.runtime.layers import Place, Places, places_of, shared_tensors
from lora_hub.runtime.quantised import is_packed, kind_of, numbers_of
from lora_hub.runtime.sharded import refusal, spread_of

# The id of a tensor in several places → those places, with their names.
Shared = Mapping[int, tuple[tuple[str, Place], ...]]
# Target of a DoRA → the norms of the rows of its weight with the update in it.
Norms = Mapping[str, Float64[Tensor, " out"]]


@dataclass(frozen=True, slots=True)
class Aimed:
    """An update and where it acts; `dtype` is that of its factors as trained."""

    place: Place
    update: Update
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Prepared:
    """What an adapter does to one model.

    Attributes:
        updates: target → update, resolved, its factors on the device they were given on.
        replaced: name of a tensor → what takes its place, and there.
        notes: what a person should hear.
        norms: what it took to resolve DoRA, on the CPU, so that it need not be asked of
            the weights again.
        alike: what it has in common with adapters of its structure; None where that is
            not kept.
    """

    updates: Mapping[str, Aimed]
    replaced: Mapping[str, tuple[Place, Replaced]]
    notes: tuple[str, ...] = ()
    norms: Norms = field(default_factory=dict)
    alike: Alike | None = None

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """The layers on which it acts."""
        if self.alike is not None:
            return self.alike.modules
        aimed = (each.place for each in self.updates.values())
        places = (*aimed, *(place for place, _ in self.replaced.values()))
        return tuple(dict.fromkeys(place.module for place in places))

    def update(self, target: str) -> Update:
        """Return what `updates` has under the name, and nothing else is made."""
        updates = self.updates
        if isinstance(updates, _Plain):
            return updates.given[target]
        return updates[target].update


class _Plain(Mapping[str, Aimed]):
    """Updates of an adapter of a known structure, aimed when they are asked for."""

    def __init__(self, alike: Alike, given: Mapping[str, Update]) -> None:
        self._alike = alike
        self.given = given

    def __getitem__(self, target: str) -> Aimed:
        update = self.given[target]
        dtype = torch.promote_types(update.a.dtype, update.b.dtype)
        return Aimed(self._alike.places[target], update, dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.given)

    def __len__(self) -> int:
        return len(self.given)


def prepare(
    model: nn.Module,
    adapter: Adapter,
    *,
    where: str,
    norms: Norms | None = None,
    structures: Structures | None = None,
) -> Prepared:
    """Return the adapter ready for the model.

    Args:
        model: its weights are read where the adapter is a DoRA, and nowhere else.
        adapter: what is to act.
        where: what to call it in messages.
        norms: of an earlier `prepare` of the same adapter; the weights, which may have
            changed since, are then not read.
        structures: what is known of adapters of this model, and what is found is kept in.

    Raises:
        FitError: as `places_of`; or an update needs a weight that cannot be computed with,
            or an aLoRA changes what does not go token by token.
    """
    structure = None if structures is None else structure_of(adapter)
    if structures is None or structure is None:
        return _prepared(model, adapter, where, norms or {})
    known = structures.now()  # before the model is looked at
    alike = known.find(structure)
    if alike is not None:
        return Prepared(_Plain(alike, adapter.updates), {}, alike.notes, alike=alike)
    made = _prepared(model, adapter, where, {})
    places = {target: aimed.place for target, aimed in made.updates.items()}
    return replace(made, alike=known.keep(structure, places, made.notes))


def _prepared(model: nn.Module, adapter: Adapter, where: str, norms: Norms) -> Prepared:
    places = places_of(model, adapter, where=where)
    replaced = {
        name: (place, adapter.replaced[name]) for name, place in places.tensors.items()
    }
    known: dict[str, Tensor] = {}
    updates = {
        target: _aimed(target, place, adapter.updates[target], replaced, norms, known)
        for target, place in places.targets.items()
    }
    _check_invocation(adapter, where)
    shared = _shared(model, places)
    notes = list(_about_convolutions(updates))
    notes += _tie_updates(shared, adapter, updates)
    notes += _tie_replaced(shared, adapter, replaced, _input_embedding(model))
    notes += _about_rows(replaced)
    return Prepared(updates, replaced, tuple(notes), known)


def _aimed(
    target: str,
    place: Place,
    update: Update,
    replaced: Mapping[str, tuple[Place, Replaced]],
    norms: Norms,
    known: dict[str, Tensor],
) -> Aimed:
    """Return the update without a magnitude; what that took goes into `known`."""
    dtype = torch.promote_types(update.a.dtype, update.b.dtype)
    if update.layer == "experts" and place.tensor.dtype not in COMPUTES:
        raise FitError(
            f"the experts are held in {place.tensor.dtype}, to which nothing can be added",
            where=target,
            hint="load the model in bfloat16 or float32",
        )
    if (
        update.q is not None
        and is_packed(place.tensor)
        and numbers_of(place.tensor, place.module) is None
    ):
        raise _no_numbers(target, place.tensor)
    if update.magnitude is None:
        return Aimed(place, update, dtype)
    norm = norms.get(target)
    if norm is None:
        norm = _norms(target, place, update, replaced.get(f"{target}.weight"))
    known[target] = norm
    return Aimed(place, with_norms(update, norm, where=target), dtype)


def _norms(
    target: str, place: Place, update: Update, given: tuple[Place, Replaced] | None
) -> Float64[Tensor, " out"]:
    spread = spread_of(place.module)
    if spread is not None:
        norms = spread.norms(update, place.tensor)
        if norms is None:
            raise _no_numbers(target, place.tensor)
        return norms
    matrix = _matrix(target, place, update, given)
    # Where the weight is, which is larger, if float64 is to be had there.
    device = torch.device("cpu") if matrix.device.type == "mps" else matrix.device
    scaling = update.scaling.to(device)
    a, b = update.a.to(device), update.b.to(device)
    return norms_of(replace(update, a=a, b=b, scaling=scaling), matrix.to(device))


def _matrix(
    target: str, place: Place, update: Update, given: tuple[Place, Replaced] | None
) -> Shaped[Tensor, "out inp"]:
    """Return the weight DoRA is measured against, with what its own adapter replaces."""
    weight = place.tensor
    if given is not None and given[1].rows is None:
        weight = given[1].tensor
    elif given is not None:
        rows = torch.tensor(given[1].rows, device=weight.device)
        weight = weight.detach().index_copy(
            0, rows, given[1].tensor.to(weight.device, weight.dtype)
        )
    if weight.is_meta:
        raise FitError(
            "DoRA needs the numbers of the weight, and they are not in memory",
            where=target,
            hint="load the model whole, or merge the adapter into the base",
        )
    numbers = numbers_of(weight, place.module)
    if numbers is None:
        raise _no_numbers(target, weight)
    weight = numbers
    if weight.dtype not in COMPUTES:
        raise FitError(
            f"DoRA needs the numbers of the weight, which is held in {weight.dtype}",
            where=target,
            hint="load the model in bfloat16 or float32",
        )
    matrix = to_matrix(weight.detach(), update.layer, is_transposed=place.is_transposed)
    if tuple(matrix.shape) != update.shape:  # e.g. four bits packed in a byte
        raise FitError(
            f"DoRA needs the weight, which is held in the shape {list(weight.shape)}",
            where=target,
            hint="load the model without quantisation",
        )
    return matrix


def _no_numbers(target: str, weight: Tensor) -> FitError:
    return FitError(
        f"the update needs the numbers of the weight, a {kind_of(weight)}, of which there "
        "is no way to them that is known",
        where=target,
        hint="load the model without quantisation",
    )


def _check_invocation(adapter: Adapter, where: str) -> None:
    if not adapter.alora_tokens:
        return
    other = sorted(
        target for target, update in adapter.updates.items() if update.layer != "linear"
    )
    if other:
        raise FitError(
            "the adapter acts from its invocation tokens on, which is known for linear "
            f"layers alone; {other[0]} is of kind {adapter.updates[other[0]].layer}",
            where=where,
        )


def _shared(model: nn.Module, places: Places) -> Shared:
    """Return `shared_tensors`, unless none of these places is one of several."""
    seen: set[int] = set()
    twice: set[int] = set()
    for module in model.modules():
        for held in (module._parameters, module._buffers):  # noqa: SLF001
            for tensor in held.values():
                (twice if id(tensor) in seen else seen).add(id(tensor))
    every = (*places.targets.values(), *places.tensors.values())
    return shared_tensors(model) if any(id(p.tensor) in twice for p in every) else {}


def _tie_updates(
    shared: Shared, adapter: Adapter, updates: dict[str, Aimed]
) -> tuple[str, ...]:
    """Let what changes an embedding change the layers tied to it, where that is meant."""
    notes = []
    for target, aimed in tuple(updates.items()):
        for other, place in _tied(shared, aimed.place):
            path = other.removesuffix(".weight")
            if path in adapter.updates:
                continue
            if adapter.ties_weights and aimed.update.layer == "embedding":
                updates[path] = _turned(path, place, aimed, adapter.updates[target])
                notes.append(f"{path} is changed with {target}, to which it is tied")
            else:
                notes.append(f"{path} shares the weight of {target} and is not changed")
    return tuple(notes)


def _turned(target: str, place: Place, aimed: Aimed, update: Update) -> Aimed:
    """Return an embedding's update as a layer tied to it sees it.

    Another embedding sees it as it is, a linear layer the transpose.
    """
    if isinstance(place.module, nn.Embedding):
        return Aimed(place, aimed.update, aimed.dtype)
    if update.magnitude is not None or aimed.update.q is not None:
        raise FitError(
            "DoRA of an embedding is not told for the layer tied to it, whose rows are "
            "others and have a magnitude of their own",
            where=target,
            hint="train it with the tied layer among the targets",
        )
    reason = refusal(place.module, "linear", has_q=aimed.update.p is not None)
    if reason is not None:
        raise FitError(reason, where=target)
    turned = replace(
        aimed.update,
        a=aimed.update.b.mT,
        b=aimed.update.a.mT,
        p=None,
        q=aimed.update.p,
        layer="linear",
    )
    return Aimed(place, turned, aimed.dtype)


def _tie_replaced(
    shared: Shared,
    adapter: Adapter,
    replaced: dict[str, tuple[Place, Replaced]],
    embedding: nn.Module | None,
) -> tuple[str, ...]:
    """Let what replaces a tied tensor replace it in all its places, where PEFT does.

    A module that was trained whole is a copy of its own, unless the adapter ties weights;
    and rows of another layer than the input embedding are always. Biases and embeddings
    saved along are the base's own tensors. Where the model does not say which embedding is
    that of its input, any is taken for it.
    """
    notes = []
    for name, (place, new) in tuple(replaced.items()):
        is_tied = new.role in ("bias", "embedding") or (
            adapter.ties_weights
            if new.rows is None
            else place.module is embedding
            or (embedding is None and isinstance(place.module, nn.Embedding))
        )
        for other, also in _tied(shared, place):
            if other in adapter.replaced:
                continue
            if not is_tied:
                notes.append(f"{other} shares the tensor {name} and is not replaced")
                continue
            replaced[other] = (also, new)
            notes.append(f"{other} is replaced with {name}, to which it is tied")
    return tuple(notes)


def _input_embedding(model: nn.Module) -> nn.Module | None:
    """Return what a model of transformers calls its input embedding."""
    ask = getattr(model, "get_input_embeddings", None)
    try:
        found = ask() if callable(ask) else None
    except NotImplementedError:  # a model that has none
        return None
    return found if isinstance(found, nn.Module) else None


def _tied(shared: Shared, place: Place) -> list[tuple[str, Place]]:
    return [
        (name, other)
        for name, other in shared.get(id(place.tensor), ())
        if (other.module, other.name) != (place.module, place.name)
    ]


def _about_convolutions(updates: Mapping[str, Aimed]) -> tuple[str, ...]:
    """Name convolutions where PEFT's own forward does not do what its merging does."""
    return tuple(
        f"{target} is changed as its weight would be, with the layer's "
        f"{'padding' if padded else 'dilation'}; PEFT attached pads with zeros and does "
        "not dilate"
        for target, aimed in updates.items()
        if isinstance(module := aimed.place.module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        and aimed.update.rank
        and (
            (padded := module.padding_mode != "zeros")
            or any(step != 1 for step in module.dilation)
        )
    )


def _about_rows(replaced: Mapping[str, tuple[Place, Replaced]]) -> tuple[str, ...]:
    """Name linear layers of whose rows PEFT's own forward forgets the bias."""
    return tuple(
        f"{name.removesuffix('.weight')} keeps its bias; PEFT attached leaves it out where "
        "rows of the weight were trained"
        for name, (place, new) in replaced.items()
        if new.rows is not None
        and isinstance(place.module, nn.Linear)
        and place.module.bias is not None
    )
