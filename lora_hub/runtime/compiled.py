"""What a host adds, as one operation that torch.compile does not look into.

Compiled code calls it with the host's number and the layer's. What acts is looked up each
time it runs, so other adapters, ranks, targets and rows compile nothing again. Only what is
added to outputs goes this way; adapters that do more run as Python in between.

Limits: where the call of the model is part of a larger compiled program, each layer asks
what acts, not the model once for all its layers; so no other thread should call `use`
meanwhile (`using` and `rows` belong to their thread and are safe), and rows are not known
where a layer sees rows and tokens in one axis. Where gradients are asked for, what acted in
the forward must act until the backward has run, and a convolution with an adapter cannot be
differentiated.
"""

import itertools
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from lora_hub.errors import InputError

if TYPE_CHECKING:
    from lora_hub.runtime.effect import Effect, Part
    from lora_hub.runtime.hooks import Hooks

_HOOKS: "WeakValueDictionary[int, Hooks]" = WeakValueDictionary()
_NUMBERS = itertools.count()


def number_of(hooks: "Hooks") -> int:
    """Return a number by which compiled code finds a host's hooks."""
    number = next(_NUMBERS)
    _HOOKS[number] = hooks
    return number


@torch.library.custom_op("lora_hub::add", mutates_args=())
def add(x: Tensor, y: Tensor, host: int, site: int) -> Tensor:
    """Return the layer's output y with what acts now added; x is what it was given."""
    effect = _effect(host, site)
    out = y.clone()
    if effect is None or effect.is_nothing:
        return out
    hooks = _HOOKS[host]
    found = effect(hooks.step_or_none, hooks.sites[site], x, out, is_fresh=True)
    return out if found is None else found


@add.register_fake
def _(x: Tensor, y: Tensor, host: int, site: int) -> Tensor:
    hooks = _HOOKS.get(host)
    if hooks is not None:
        hooks.is_traced = True
    return torch.empty_like(y)


@torch.library.custom_op("lora_hub::add_backward", mutates_args=())
def add_backward(
    gradient: Tensor, x: Tensor, host: int, site: int
) -> tuple[Tensor, Tensor]:
    """Return the gradients by x and by y; an empty one by numbers of tokens."""
    is_index = not x.is_floating_point()
    by_x = x.new_zeros((0,), dtype=gradient.dtype) if is_index else torch.zeros_like(x)
    by_y = gradient.clone()
    effect = _effect(host, site, again=True)
    if effect is None or effect.is_nothing:
        return by_x, by_y
    layer = _HOOKS[host].sites[site]
    dtype = torch.promote_types(effect.dtype, gradient.dtype)
    for part in effect.parts(x, dtype):
        where = slice(None) if part.rows is None else part.rows.of(len(x), x.device)
        by_row = _weighted(part, gradient[where].to(dtype))
        _to_y(part, by_y, x, by_row, where)
        if not is_index:
            _to_x(part, by_x, layer, by_row, where)
    return by_x, by_y


@add_backward.register_fake
def _(gradient: Tensor, x: Tensor, host: int, site: int) -> tuple[Tensor, Tensor]:
    is_index = not x.is_floating_point()
    by_x = x.new_empty((0,), dtype=gradient.dtype) if is_index else torch.empty_like(x)
    return by_x, torch.empty_like(gradient)


def _setup_context(
    ctx: Any, inputs: tuple[Tensor, Tensor, int, int], output: Tensor
) -> None:
    x, _, ctx.host, ctx.site = inputs
    ctx.save_for_backward(x)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
    (x,) = ctx.saved_tensors
    by_x, by_y = torch.ops.lora_hub.add_backward(
        gradient.contiguous(), x, ctx.host, ctx.site
    )
    return by_x if x.is_floating_point() else None, by_y, None, None


add.register_autograd(_backward, setup_context=_setup_context)


def _effect(host: int, site: int, *, again: bool = False) -> "Effect | None":
    hooks = _HOOKS.get(host)
    if hooks is None:  # the host is gone, and with it all that acted
        return None
    return hooks.effect(site, again=again)


def _weighted(part: "Part", gradient: Tensor) -> Tensor:
    if part.weights is None:
        return gradient * part.weight
    rows = gradient.view(len(part.weights), -1) * part.weights[:, None]
    return rows.view(gradient.shape)


def _to_y(part: "Part", by_y: Tensor, x: Tensor, by_row: Tensor, where: Any) -> None:
    own = part.own
    if own.p is not None:
        by_y[where] += (by_row * own.p).to(by_y.dtype)
    if own.q is not None and own.layer == "embedding":
        by_y[where] += (by_row * own.q[x[where]].unsqueeze(-1)).to(by_y.dtype)


def _to_x(
    part: "Part", by_x: Tensor, layer: torch.nn.Module, by_row: Tensor, where: Any
) -> None:
    own = part.own
    if own.layer != "linear":
        raise InputError(
            "a convolution with an adapter cannot be differentiated in compiled code",
            where=part.resident.name,
            hint="train without torch.compile",
        )
    by_x[where] += (by_row @ own.bt.mT @ own.a).to(by_x.dtype)
    if own.q is not None:
        weight = layer.weight
        assert isinstance(weight, Tensor)
        matrix = weight.mT if type(layer).__name__ == "Conv1D" else weight
        by_x[where] += (by_row @ matrix.to(by_row.dtype) * own.q).to(by_x.dtype)
