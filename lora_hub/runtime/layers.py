"""Which layer of a model each target of an adapter is: all are found, or none is used."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lora_hub.adapter.adapter import Adapter, Replaced
from lora_hub.adapter.layout import to_matrix
from lora_hub.adapter.update import Update
from lora_hub.errors import FitError, InputError
from lora_hub.manifest.document import Layer
from lora_hub.runtime.added import embed_scale, is_conv1d
from lora_hub.runtime.quantised import kind_of
from lora_hub.runtime.sharded import refusal
from lora_hub.runtime.shares import is_spread

ALL_LINEAR = "all-linear"  # every linear layer, as PEFT calls it
SHOWN = 3  # reasons named in one message; the error carries all of them


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """A tensor of a model: the module that holds it, its name there, how it is laid out."""

    module: nn.Module
    name: str = "weight"
    is_transposed: bool = False

    @property
    def tensor(self) -> Tensor:
        """The tensor as it is now."""
        found = getattr(self.module, self.name)
        assert isinstance(found, Tensor)
        return found


@dataclass(frozen=True, slots=True)
class Places:
    """Where an adapter acts: target → place, name of a replaced tensor → place."""

    targets: Mapping[str, Place]
    tensors: Mapping[str, Place]


def places_of(model: nn.Module, adapter: Adapter, *, where: str) -> Places:
    """Return the place of every target and every replaced tensor.

    Args:
        model: where the targets are paths of modules, for experts of parameters.
        adapter: its shapes are compared with the model's.
        where: what to call the adapter in messages.

    Raises:
        FitError: one does not exist, is no layer of the update's kind, has another shape,
            or is a layer whose `forward` torch does not call.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[str, Place] = {}
    tensors: dict[str, Place] = {}
    reasons: list[str] = []
    for target, update in adapter.updates.items():
        place = _place(modules, target, update)
        if isinstance(place, str):
            reasons.append(f"{target} {place}")
        else:
            found[target] = place
    for name, replaced in adapter.replaced.items():
        place = _tensor(modules, name, replaced)
        if isinstance(place, str):
            reasons.append(f"{name} {place}")
        else:
            tensors[name] = place
    if reasons:
        total = len(adapter.updates) + len(adapter.replaced)
        more = len(reasons) - SHOWN
        raise FitError(
            f"{len(reasons)} of {total} targets cannot be applied: "
            + "; ".join(reasons[:SHOWN])
            + (f"; and {more} more" if more > 0 else ""),
            where=where,
            hint="nothing was loaded; give the model the adapter was made for, with its "
            "module names as they were",
            reasons=tuple(reasons),
        )
    return Places(found, tensors)


def shared_tensors(model: nn.Module) -> Mapping[int, tuple[tuple[str, Place], ...]]:
    """Return the id of each tensor in several places → those places, with their names."""
    found: dict[int, list[tuple[str, Place]]] = {}
    for path, module in model.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):  # noqa: SLF001
            if tensor is not None:
                place = Place(module, name, is_conv1d(module))
                full = f"{path}.{name}" if path else name
                found.setdefault(id(tensor), []).append((full, place))
    return {key: tuple(places) for key, places in found.items() if len(places) > 1}


def reserved_layers(model: nn.Module, names: str | Sequence[str]) -> list[nn.Module]:
    """Return the layers that are meant: all linear ones, or those of these names.

    Args:
        model: whose layers.
        names: "all-linear", or paths of layers or ends of them, such as "q_proj".

    Raises:
        InputError: a name is that of no layer that can be adapted.
    """
    kinds = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    layers = {
        path: module
        for path, module in model.named_modules()
        if is_conv1d(module)
        or (
            isinstance(module, kinds)
            and not isinstance(module, NonDynamicallyQuantizableLinear)
        )
    }
    if names == ALL_LINEAR:
        return [
            each
            for each in layers.values()
            if isinstance(each, nn.Linear) or is_conv1d(each)
        ]
    found: list[nn.Module] = []
    for name in (names,) if isinstance(names, str) else names:
        own = [each for path, each in layers.items() if f".{path}".endswith(f".{name}")]
        if not own:
            raise InputError(
                "the model has no layer of this name that can be adapted",
                where=name,
                hint=f"give paths of layers, their last names, or {ALL_LINEAR!r}",
            )
        found += own
    return found


def _place(modules: Mapping[str, nn.Module], target: str, update: Update) -> Place | str:
    """Return where the update acts, or why it cannot act."""
    if update.layer == "experts":
        return _experts(modules, target, update)
    module = modules.get(target)
    if module is None:
        return "does not exist in the model"
    reason = _KINDS[update.layer](module, update) or refusal(
        module, update.layer, has_q=update.q is not None
    )
    return reason or Place(module, is_transposed=_is_transposed(module, update.layer))


def _is_transposed(module: nn.Module, layer: Layer) -> bool:
    return layer == "embedding" or is_conv1d(module)


def _linear(module: nn.Module, update: Update) -> str | None:
    if is_conv1d(module):
        return _other_shape(Place(module, is_transposed=True), update)
    if not isinstance(module, nn.Linear):
        return f"is a {type(module).__name__}, expected a torch.nn.Linear"
    if isinstance(module, NonDynamicallyQuantizableLinear):
        # MultiheadAttention reads its weight and never calls it, so a hook has no effect.
        return "is inside a torch.nn.MultiheadAttention, which does not call it"
    return _differ((module.out_features, module.in_features), update)


def _embedding(module: nn.Module, update: Update) -> str | None:
    if not isinstance(module, nn.Embedding):
        return f"is a {type(module).__name__}, expected a torch.nn.Embedding"
    if module.max_norm is not None:
        return "is an embedding with max_norm, which changes its weight when it is called"
    scale = embed_scale(module)
    if scale is not None and scale.numel() != 1:
        return f"has an embed_scale of {scale.numel()} numbers, expected one"
    if scale is None and type(module).forward is not nn.Embedding.forward:
        return (
            f"is a {type(module).__name__}, whose forward is its own and has no embed_scale"
        )
    return _differ((module.embedding_dim, module.num_embeddings), update)


def _conv(module: nn.Module, update: Update) -> str | None:
    if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return f"is a {type(module).__name__}, expected a torch.nn.Conv1d, 2d or 3d"
    if update.rank and update.kernel != module.kernel_size:
        return (
            f"has a kernel of {list(module.kernel_size)}, the update is for "
            f"{list(update.kernel)}"
        )
    if update.rank and update.groups != module.groups:
        return f"has {module.groups} groups, the update is for {update.groups}"
    size = prod(module.kernel_size) if update.kernel else 1
    return _differ((module.out_channels, module.in_channels * size), update)


_KINDS: Mapping[Layer, Callable[[nn.Module, Update], str | None]] = {
    "linear": _linear,
    "embedding": _embedding,
    "conv": _conv,
}


def _experts(modules: Mapping[str, nn.Module], target: str, update: Update) -> Place | str:
    path, _, name = target.rpartition(".")
    module = modules.get(path)
    tensor = None if module is None else module._parameters.get(name)  # noqa: SLF001
    if module is None or tensor is None:
        return "does not exist in the model as a parameter"
    if tensor.dim() not in (2, 3):
        return f"is a parameter of {tensor.dim()} axes, expected 2 or 3"
    if (reason := _not_its_numbers(tensor)) is not None:
        return reason
    place = Place(module, name, is_transposed=bool(getattr(module, "is_transposed", False)))
    return _other_shape(place, update) or place


def _tensor(
    modules: Mapping[str, nn.Module], full_name: str, replaced: Replaced
) -> Place | str:
    path, _, name = full_name.rpartition(".")
    module = modules.get(path)
    if module is None:
        return "does not exist in the model"
    tensor = (module._parameters | module._buffers).get(name)  # noqa: SLF001
    if tensor is None:
        return "does not exist in the model"
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return "is inside a torch.nn.MultiheadAttention, which does not call its module"
    if (reason := _not_its_numbers(tensor)) is not None:
        return reason
    new, rows = replaced.tensor.shape, replaced.rows
    found = tuple(tensor.shape)
    wanted = tuple(new) if rows is None else (*found[:1], *new[1:])
    if found != wanted:
        return f"is of shape {list(found)}, the adapter's is {list(new)}"
    if rows is not None and (not found or max(rows, default=0) >= found[0]):
        return f"has {found[0] if found else 0} rows, the adapter brings row {max(rows)}"
    return Place(module, name)


def _not_its_numbers(tensor: Tensor) -> str | None:
    """Return why a tensor cannot be put in the place of this one, None where one can."""
    if is_spread(tensor):
        return "is spread over processes, and would have to be whole"
    kind = kind_of(tensor)
    return None if kind is None else f"is quantised, a {kind}; leave this module as it was"


def _other_shape(place: Place, update: Update) -> str | None:
    matrix = to_matrix(place.tensor, update.layer, is_transposed=place.is_transposed)
    return _differ(tuple(matrix.shape), update)


def _differ(found: tuple[int, ...], update: Update) -> str | None:
    """Return how the shapes differ; an update of rank 0 may not know one side."""
    wanted = update.shape
    if len(found) == len(wanted) and all(
        one == other or (not update.rank and not other)
        for one, other in zip(found, wanted, strict=True)
    ):
        return None
    return f"has a weight of shape {list(found)}, the update is {list(wanted)}"
