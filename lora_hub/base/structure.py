"""Do names and shapes of an adapter agree with a base? No weight is read.

This is all that can be said of a bare directory, which records no base, and the first
thing asked of a package. `fit.py` compares contents.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

from lora_hub.base.orientation import matrix_shape, stores_transposed, weight_shape
from lora_hub.base.stored import Stored, stored
from lora_hub.base.view import BaseView
from lora_hub.embeddings import VOCABULARY, last_part
from lora_hub.errors import FitError
from lora_hub.manifest.document import BaseConfig, Layer
from lora_hub.tensors.header import TensorInfo


class LowRank(Protocol):
    """What is asked of an update on disk."""

    @property
    def target(self) -> str: ...
    @property
    def rank(self) -> int: ...
    @property
    def a(self) -> TensorInfo: ...
    @property
    def b(self) -> TensorInfo: ...
    @property
    def layer(self) -> Layer: ...
    @property
    def magnitude(self) -> TensorInfo | None: ...
    @property
    def bias(self) -> TensorInfo | None: ...
    @property
    def weight(self) -> str: ...


class Scales(Protocol):
    """What is asked of factors on outputs or inputs."""

    @property
    def target(self) -> str: ...
    @property
    def axis(self) -> str: ...
    @property
    def vector(self) -> TensorInfo: ...
    @property
    def weight(self) -> str: ...


class Replaces(Protocol):
    """What is asked of a tensor that takes the place of the base's."""

    @property
    def name(self) -> str: ...
    @property
    def role(self) -> str: ...
    @property
    def tensor(self) -> TensorInfo: ...
    @property
    def rows(self) -> tuple[int, ...] | None: ...


class Changes(Protocol):
    """What is asked of an adapter on disk; `formats.source.AdapterSource` is one."""

    @property
    def updates(self) -> Sequence[LowRank]: ...
    @property
    def scales(self) -> Sequence[Scales]: ...
    @property
    def replacements(self) -> Sequence[Replaces]: ...


@dataclass(frozen=True, slots=True)
class Structure:
    """How an adapter lies on a base.

    Attributes:
        weights: names of the base's tensors that change, as the adapter calls them, in
            order: weights and biases, replaced tensors.
        places: name → where the base keeps it.
        new: replaced tensors that the base does not have, a head for its task.
    """

    weights: tuple[str, ...]
    places: Mapping[str, Stored]
    new: tuple[str, ...]


def check_structure(source: Changes, view: BaseView) -> Structure:
    """Return what of a base an adapter changes, all of it being there and of its shape.

    Names are looked for as `stored.py` tells. Where the adapter brings a tensor whole that
    the base does not have, it is new; everything else must be there.

    Raises:
        FitError: something is not; the reasons list each.
    """
    places = {name: stored(view.tensors, view.config, name) for name in _names(source)}
    found = {name: place for name, place in places.items() if place is not None}
    look = _Look(found, view.config, {one.name: one for one in source.replacements})
    reasons = (
        *(look.update(update) for update in source.updates),
        *(look.scales(scales) for scales in source.scales),
        *(look.replacement(replaced) for replaced in source.replacements),
        *_partly_saved(source, view),
    )
    wrong = tuple(reason for reason in reasons if reason)
    new = tuple(one.name for one in source.replacements if one.name not in found)
    if not wrong and not found:
        wrong = (
            f"none of the {len(new)} tensors it brings is in the base, first {new[0]}",
        )
    if wrong:
        raise FitError(
            f"{len(wrong)} of {len(reasons)} targets do not fit the base: {wrong[0]}",
            where=view.where,
            hint="give the base the adapter was trained on",
            reasons=wrong,
        )
    return Structure(tuple(sorted(found)), found, new)


def _names(source: Changes) -> Iterator[str]:
    """Give the name of every tensor that may change, some of them twice."""
    for update in source.updates:
        yield update.weight
        if update.bias is not None:
            yield _bias(update.target)
    for scales in source.scales:
        yield scales.weight
        if scales.axis == "rows":
            yield _bias(scales.target)
    for replaced in source.replacements:
        yield replaced.name


def _bias(target: str) -> str:
    return f"{target}.bias"


def _partly_saved(source: Changes, view: BaseView) -> Iterator[str]:
    """Give a reason for each layer that was saved whole and of which the base knows better.

    Whoever saves a layer whole saves its weight and its bias, and nothing that the base's
    own layer of that name is without. What lies in a layer is new only with the layer.
    """
    names = {one.name for one in source.replacements}
    for replaced in source.replacements:
        if replaced.role != "modules_to_save" or replaced.rows is not None:
            continue
        module = replaced.name.rpartition(".")[0]
        of_layer = {
            name
            for name in (f"{module}.weight", f"{module}.bias")
            if stored(view.tensors, view.config, name) is not None
        }
        missing = sorted(of_layer - names)
        if missing:
            yield f"the adapter brings {replaced.name} anew and not {missing[0]}"
        around = module.rpartition(".")[0]
        for layer in (module.removesuffix(".weight").removesuffix(".bias"), module, around):
            is_new = stored(view.tensors, view.config, replaced.name) is None
            known = stored(view.tensors, view.config, f"{layer}.weight")
            if layer and is_new and known is not None:
                yield f"{replaced.name} does not exist, and {layer}.weight does"
                break


@dataclass(frozen=True, slots=True)
class _Look:
    """Compares the parts of an adapter with a base; each gives a reason, or "" if it fits.

    Attributes:
        found: name → where the base keeps it.
        whole: name → what takes the tensor's place.
    """

    found: Mapping[str, Stored]
    config: BaseConfig
    whole: Mapping[str, Replaces]

    def update(self, update: LowRank) -> str:
        is_transposed = stores_transposed(
            update.layer, update.target, self.config.model_type
        )
        a, b = update.a.shape, update.b.shape
        wanted = weight_shape(update.layer, update.rank, a, b, is_transposed=is_transposed)
        if wanted is None:
            return (
                f"the factors of {update.target} are {size(a)} and {size(b)}, expected "
                f"rank {update.rank}"
            )
        shape = self._shape(update.weight)
        if shape is None:
            return f"{update.weight} does not exist"
        if not same_shape(update.layer, shape, wanted):
            return _other_shape(update.weight, shape, wanted, "the adapter's delta is")
        return self._vectors(update, b[0])

    def _vectors(self, update: LowRank, outputs: int) -> str:
        for vector, called in ((update.magnitude, "magnitude"), (update.bias, "bias")):
            if vector is not None and prod(vector.shape) != outputs:
                return (
                    f"the {called} of {update.target} has {prod(vector.shape)} numbers, "
                    f"its layer {outputs} outputs"
                )
        return ""

    def scales(self, scales: Scales) -> str:
        shape = self._shape(scales.weight)
        if shape is None:
            return f"{scales.weight} does not exist"
        is_transposed = stores_transposed("linear", scales.target, self.config.model_type)
        matrix = matrix_shape("linear", shape, is_transposed=is_transposed)
        axis = 0 if scales.axis == "rows" else 1
        expected = matrix[axis] if len(matrix) > axis else 0
        if prod(scales.vector.shape) != expected:
            what = "outputs" if scales.axis == "rows" else "inputs"
            return (
                f"{scales.target} has {expected} {what}, the adapter scales "
                f"{prod(scales.vector.shape)}"
            )
        return ""

    def replacement(self, replaced: Replaces) -> str:
        name, rows = replaced.name, replaced.rows
        place = self.found.get(name)
        if place is None:
            # A head may be new. Rows and biases are those of something.
            is_new = rows is None and replaced.role in ("modules_to_save", "embedding")
            return "" if is_new else f"{name} does not exist"
        shape, new = place.shape, replaced.tensor.shape
        if rows is None:
            return "" if shape == new else _other_shape(name, shape, new, "the new one is")
        if new != (len(rows), *shape[1:]):
            wanted = size((len(rows), *shape[1:]))
            return f"the new rows of {name} are {size(new)}, expected {wanted}"
        if not all(0 <= row < shape[0] for row in rows):
            return (
                f"the adapter brings row {max(rows)} of {name}, which has {shape[0]} rows: "
                "it was trained after the vocabulary was resized"
            )
        return ""

    def _shape(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of a weight as updates meet it: replaced, where it is whole."""
        replaced = self.whole.get(name)
        if replaced is not None and replaced.rows is None:
            return replaced.tensor.shape
        place = self.found.get(name)
        return None if place is None else place.shape


def same_shape(layer: Layer, shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Return whether a weight has the shape; one expert may lack the axis of experts."""
    one = layer == "experts" and wanted[0] == 1
    return shape == wanted or (one and shape == wanted[1:])


def is_resized(name: str, shape: tuple[int, ...], new: tuple[int, ...]) -> bool:
    """Return whether the two shapes of a tensor are of vocabularies of two sizes."""
    is_vocabulary = last_part(name.rpartition(".")[0]) in VOCABULARY
    return is_vocabulary and shape[1:] == new[1:] and shape != new


def _other_shape(name: str, shape: tuple[int, ...], new: tuple[int, ...], what: str) -> str:
    if is_resized(name, shape, new):
        return (
            f"the adapter was trained after resizing the vocabulary from {shape[0]} to "
            f"{new[0]}: {name}"
        )
    return f"{name} is {size(shape)}, {what} {size(new)}"


def size(shape: Collection[int]) -> str:
    """Return a shape as text: 8×4."""
    return "×".join(map(str, shape)) or "a scalar"
