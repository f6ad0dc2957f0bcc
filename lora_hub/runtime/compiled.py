"""What a host adds, as one operation that torch.compile does not look into.

Compiled code calls it with the host's number and the layer's. What acts is looked up each
time it runs, so other adapters, ranks, targets and rows compile nothing again. Only what is
added to outputs goes this way; adapters that do more run as Python in between.

Limits: where the call of the model is part of a larger compiled program, each layer asks
what acts, not the model once for all its layers; so no other thread should call `use`
meanwhile (`using` and `rows` belong to their thread and are safe), and rows are not known
where a layer sees rows and tokens in one axis. A backward is that of what acted in its own
forward, and refused where that is gone; a convolution with an adapter cannot be
differentiated.
"""

import itertools
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from lora_hub.errors import InputError
from lora_hub.runtime.route import BARE, route_of

if TYPE_CHECKING:
    from lora_hub.runtime.effect import Part
    from lora_hub.runtime.hooks import Hooks

_HOOKS: "WeakValueDictionary[int, Hooks]" = WeakValueDictionary()
_NUMBERS = itertools.count()


def number_of(hooks: "Hooks") -> int:
    """Return a number by which compiled code finds a host's hooks."""
    number = next(_NUMBERS)
    _HOOKS[number] = hooks
    return number


# A CUDA graph would replay what acted when it was captured, so torch.compile captures
# around these (mode="reduce-overhead"); torch since 2.9 knows how.
_TAGS = [
    getattr(torch.Tag, name) for name in ("cudagraph_unsafe",) if hasattr(torch.Tag, name)
]


@torch.library.custom_op("lora_hub::add", mutates_args=(), tags=_TAGS)
def add(x: Tensor, y: Tensor, host: int, site: int) -> tuple[Tensor, Tensor]:
    """Return the layer's output y with what acts now added, and the number of that.

    The number is for the backward, and x is what the layer was given.
    """
    hooks = _HOOKS.get(host)
    out = y.clone()
    if hooks is None:  # the host is gone, and with it all that acted
        return out, torch.tensor(BARE.number)
    route = hooks.traced(site)
    effect = hooks.effect_of(route, site)
    if not effect.is_nothing:
        layer, is_fresh = hooks.sites[site], out.is_contiguous()
        found = effect(hooks.step_or_none, layer, x, out, is_fresh=is_fresh)
        if found is not None:
            out.copy_(found)  # which keeps the strides that were promised
    return out, torch.tensor(route.number if route.entries else BARE.number)


@add.register_fake
def _(x: Tensor, y: Tensor, host: int, site: int) -> tuple[Tensor, Tensor]:
    hooks = _HOOKS.get(host)
    if hooks is not None:
        hooks.is_traced = True
    return torch.empty_like(y), torch.empty((), dtype=torch.int64)


@torch.library.custom_op("lora_hub::add_backward", mutates_args=(), tags=_TAGS)
def add_backward(
    gradient: Tensor, x: Tensor, acted: Tensor, host: int, site: int
) -> tuple[Tensor, Tensor]:
    """Return the gradients by x and by y; an empty one by numbers of tokens.

    Args:
        gradient: by the output.
        x: what the layer was given.
        acted: the number of what acted in the forward.
        host: its number.
        site: that of the layer.

    Raises:
        InputError: what acted is not there any more.
    """
    is_index = not x.is_floating_point()
    by_x = x.new_zeros((0,), dtype=gradient.dtype) if is_index else torch.zeros_like(x)
    by_y = gradient.clone()
    number, hooks = int(acted), _HOOKS.get(host)
    if number == BARE.number:
        return by_x, by_y
    route = route_of(number)
    if hooks is None or route is None:
        raise InputError(
            "the adapters that acted in the forward of compiled code are not used any more "
            "in its backward",
            where=None if hooks is None else hooks.sites.path(site),
            hint="call backward() before other adapters are used",
        )
    effect = hooks.effect_of(route, site)
    if effect.is_nothing:
        return by_x, by_y
    layer = hooks.sites[site]
    dtype = torch.promote_types(effect.dtype, gradient.dtype)
    for part in effect.parts(x, dtype):
        where = slice(None) if part.rows is None else part.rows.of(len(x), x.device)
        by_row = _weighted(part, gradient[where].to(dtype))
        _to_y(part, by_y, x, by_row, where)
        if not is_index:
            _to_x(part, by_x, layer, by_row, where)
    return by_x, by_y


@add_backward.register_fake
def _(
    gradient: Tensor, x: Tensor, acted: Tensor, host: int, site: int
) -> tuple[Tensor, Tensor]:
    is_index = not x.is_floating_point()
    by_x = x.new_empty((0,), dtype=gradient.dtype) if is_index else torch.empty_like(x)
    return by_x, torch.empty_like(gradient)


def _setup_context(
    ctx: Any, inputs: tuple[Tensor, Tensor, int, int], output: tuple[Tensor, Tensor]
) -> None:
    x, _, ctx.host, ctx.site = inputs
    ctx.save_for_backward(x, output[1])


def _backward(
    ctx: Any, gradient: Tensor, _: Any
) -> tuple[Tensor | None, Tensor, None, None]:
    x, acted = ctx.saved_tensors
    by_x, by_y = torch.ops.lora_hub.add_backward(
        gradient.contiguous(), x, acted, ctx.host, ctx.site
    )
    return by_x if x.is_floating_point() else None, by_y, None, None


add.register_autograd(_backward, setup_context=_setup_context)


def _weighted(part: "Part", gradient: Tensor) -> Tensor:
    if part.weights is None:
        return gradient * part.weight
    rows = gradient.reshape(len(part.weights), -1) * part.weights[:, None]
    return rows.to(gradient.dtype).view(gradient.shape)


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
