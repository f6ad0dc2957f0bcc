"""What adapters with weights do to a model, as hooks on its modules.

Per layer all updates become one effect; adapters that wait for their invocation tokens
have one of their own. A tensor that any of them replaces is swapped while its module runs.
Where an update scales a weight (p, q) that is replaced, the scaling goes into the swapped
tensor, since each adapter scales the weight as it alone would have it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lora_hub.adapter.update import Update
from lora_hub.composing.linear import Term
from lora_hub.errors import ComposeError
from lora_hub.runtime.effect import Effect
from lora_hub.runtime.invocation import Invocation
from lora_hub.runtime.layers import Place
from lora_hub.runtime.prepare import Prepared
from lora_hub.runtime.swap import Part, Swap

Key = tuple[nn.Module, str]  # a tensor's module and its name there


@dataclass(frozen=True, slots=True)
class Acting:
    """An adapter that is to act: ready, its weight (not zero), its invocation tokens."""

    name: str
    prepared: Prepared
    weight: float
    tokens: tuple[int, ...] = ()


@dataclass(slots=True)
class _Joint:
    """All terms of one effect, with the dtype their factors were trained in."""

    target: str
    terms: list[Term] = field(default_factory=list)
    dtypes: list[torch.dtype] = field(default_factory=list)


class Acts:
    """The hooks of adapters that act together; made first, put on afterwards.

    Raises:
        ComposeError: a weight makes a number that the dtype which is computed in cannot
            hold; or a tensor that is no floating-point one would be weighted.
    """

    def __init__(self, adapters: Sequence[Acting]) -> None:
        self._swaps: list[Swap] = []
        self._effects: list[tuple[nn.Module, Effect]] = []
        self._invocations = {
            adapter.tokens: Invocation(adapter.tokens, where=adapter.name)
            for adapter in adapters
            if adapter.tokens
        }
        self._hooks: list[RemovableHandle] = []
        self._make_swaps(adapters)
        self._make_effects(adapters)

    def put_on(self, model: nn.Module) -> None:
        """Register every hook; the model acts so from its next call on."""
        hooks = self._hooks
        for each in self._invocations.values():
            hooks.append(model.register_forward_pre_hook(each.before, with_kwargs=True))
            hooks.append(
                model.register_forward_hook(
                    each.after, with_kwargs=True, always_call=True, prepend=True
                )
            )
        for swap in self._swaps:
            module = swap.place.module
            # First of all, so that no hook fails before it; and last, after the effects.
            hooks.append(module.register_forward_pre_hook(swap.before, prepend=True))
        for module, effect in self._effects:
            hooks.append(module.register_forward_hook(effect, with_kwargs=True))
        for swap in self._swaps:
            module = swap.place.module
            hooks.append(module.register_forward_hook(swap.after, always_call=True))

    def take_off(self) -> None:
        """Remove every hook, and restore what a broken-off call may have left."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for swap in self._swaps:
            swap.restore()

    def __bool__(self) -> bool:
        return bool(self._hooks)

    def _make_swaps(self, adapters: Sequence[Acting]) -> None:
        parts: dict[Key, list[Part]] = {}
        terms: dict[Key, list[Term]] = {}
        places: dict[Key, Place] = {}
        names: dict[Key, str] = {}
        for adapter in adapters:
            for name, (place, new) in adapter.prepared.replaced.items():
                key = place.module, place.name
                parts.setdefault(key, []).append(Part(adapter.weight, new))
                places.setdefault(key, place)
                names.setdefault(key, name)
        for adapter in adapters:
            for target, aimed in adapter.prepared.updates.items():
                place, update = aimed.place, aimed.update
                key = place.module, place.name
                bias = place.module, "bias"
                if update.layer == "experts":
                    terms.setdefault(key, []).append((update, adapter.weight))
                    names.setdefault(key, target)
                    places[key] = place  # knows how the tensor is laid out
                elif key in parts and _scales(update):
                    _add_scales(parts[key], adapter, key, update)
                    places[key] = place
                if bias in parts and update.bias_scale is not None:
                    _add_scales(parts[bias], adapter, bias, update)
        for key, place in places.items():
            swap = Swap(place, parts.get(key, ()), terms.get(key, ()))
            _check_floating(place, parts.get(key, ()), names[key])
            if not swap.is_finite:
                raise _not_finite(names[key])
            self._swaps.append(swap)

    def _make_effects(self, adapters: Sequence[Acting]) -> None:
        swapped = {(swap.place.module, swap.place.name) for swap in self._swaps}
        joints: dict[tuple[nn.Module, tuple[int, ...]], _Joint] = {}
        for adapter in adapters:
            for target, aimed in adapter.prepared.updates.items():
                update = aimed.update
                if update.layer == "experts":
                    continue
                if (aimed.place.module, "weight") in swapped:
                    update = replace(update, p=None, q=None)
                if (aimed.place.module, "bias") in swapped:
                    update = replace(update, bias_scale=None)
                joint = joints.setdefault(
                    (aimed.place.module, adapter.tokens), _Joint(target)
                )
                joint.terms.append((update, adapter.weight))
                if update.rank:
                    joint.dtypes.append(aimed.dtype)
        for (module, tokens), joint in joints.items():
            gate = self._invocations[tokens].gate if tokens else None
            dtype = reduce(torch.promote_types, joint.dtypes) if joint.dtypes else None
            effect = Effect(joint.terms, module, dtype=dtype, gate=gate)
            if not effect.is_finite:
                raise _not_finite(joint.target)
            self._effects.append((module, effect))


def _scales(update: Update) -> bool:
    return update.p is not None or update.q is not None


def _add_scales(parts: list[Part], adapter: Acting, key: Key, update: Update) -> None:
    """Put the scaling to what its own adapter replaces, or beside it where it does not."""
    own = {
        id(new)
        for place, new in adapter.prepared.replaced.values()
        if (place.module, place.name) == key
    }
    for index, part in enumerate(parts):
        if id(part.replaced) in own and part.scales is None:
            parts[index] = replace(part, scales=update)
            return
    parts.append(Part(adapter.weight, scales=update))


def _check_floating(place: Place, parts: Iterable[Part], name: str) -> None:
    weights = [part.weight for part in parts]
    if weights not in ([], [1.0]) and not place.tensor.is_floating_point():
        raise ComposeError(
            f"a replaced tensor of {place.tensor.dtype} has no weighted sum",
            where=name,
            hint="use the adapter alone, with weight 1",
        )


def _not_finite(where: str) -> ComposeError:
    return ComposeError(
        "the adapters and their weights make numbers that are not finite in the dtype "
        "which is computed in",
        where=where,
        hint="give smaller weights; `lorahub validate` finds NaN in adapters",
    )
