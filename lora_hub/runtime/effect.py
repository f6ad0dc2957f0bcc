"""What a route adds to the output of one layer.

The layer computes its own output as ever and its weight is never touched. An `Effect` is
made once for a route and a layer. Where it can, it adds straight into the output, which
the layer has just made and nobody else has seen; otherwise beside it. The arithmetic of
each kind of layer stands in `added.py`, which layers share the product with `a` in
`shrink.py`; this file decides the dtype and which rows an adapter sees.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from lora_hub.errors import InputError
from lora_hub.runtime.added import ADDED
from lora_hub.runtime.invocation import by_itself, gate
from lora_hub.runtime.product import Products
from lora_hub.runtime.resident import Factors, Resident
from lora_hub.runtime.route import Entry, Route, Rows
from lora_hub.runtime.sharded import spread_of
from lora_hub.runtime.shrink import Shrink, shrink_of
from lora_hub.runtime.sites import Sites
from lora_hub.runtime.step import Step
from lora_hub.runtime.which_rows import check_rows

# In these, sums of several adapters are rounded once they are complete.
_WIDE = (torch.float32, torch.float64)

# Tokens from which on a product shared between siblings is worth its bookkeeping (two
# microseconds, one core).
_MANY = 16


class Part:
    """One adapter on some rows of one layer; None for all of them.

    Attributes:
        at: `a` transposed.
        at3, bt3: the same with an axis in front, for a batch of one row.
        weights: one for each of the rows, in float32 or wider; given in float64.
    """

    __slots__ = (
        "_given",
        "at",
        "at3",
        "bt",
        "bt3",
        "own",
        "resident",
        "rows",
        "shrink",
        "weight",
        "weights",
    )

    def __init__(
        self,
        resident: Resident,
        own: Factors,
        rows: Rows | None,
        weight: float,
        weights: Float[Tensor, " rows"] | None = None,
        shrink: Shrink | None = None,
    ) -> None:
        self.resident = resident
        self.own = own
        self.rows = rows
        self.weight = weight
        self._given = weights
        self.weights: Tensor | None = None
        if weights is not None:
            # Kept for other forwards, some of which may want gradients. Not in 16 bits,
            # which would round the weight and then the product.
            with torch.inference_mode(False):
                wide = torch.promote_types(own.bt.dtype, torch.float32)
                self.weights = weights.to(wide).to(own.bt.device)
        self.shrink = shrink
        self.at, self.bt = own.a.mT, own.bt
        self.at3, self.bt3 = self.at[None], own.bt[None]

    def with_own(self, own: Factors) -> "Part":
        """Return the same with other factors, which share nothing with siblings."""
        return Part(self.resident, own, self.rows, self.weight, self._given)


class Effect:
    """What a route does at one site; None of it changes once it is made.

    Args:
        products: what the kernels of a GPU may compute; None where torch does it all.

    Attributes:
        is_nothing: whether no adapter of the route has this site.
    """

    __slots__ = (
        "_device",
        "_dtype",
        "_is_cuda",
        "_is_direct",
        "_is_plain",
        "_is_uniform",
        "_moved",
        "_number",
        "_parts",
        "_product",
        "_sites",
        "_spread",
        "_total",
        "is_nothing",
    )

    def __init__(
        self, route: Route, number: int, sites: Sites, products: Products | None = None
    ) -> None:
        parts = [
            part for entry, own in route.at(number) for part in _parts(entry, own, number)
        ]
        self.is_nothing = not parts
        self._number = number
        self._sites = sites
        self._total = route.total
        self._moved: tuple[Tensor, list[Part]] | None = None
        self._set(parts, is_alone=route.is_alone)
        self._product = None
        if parts and products is not None and self._spread is None:
            residents = {part.resident for part in parts}
            self._product = products.at(route, number, residents)

    @property
    def dtype(self) -> torch.dtype:
        """The widest of its factors."""
        return self._dtype

    def _set(self, parts: Sequence[Part], *, is_alone: bool) -> None:
        self._parts = list(parts)
        if not parts:
            return
        self._spread = spread_of(self._sites[self._number])
        dtypes = {part.own.bt.dtype for part in parts}
        self._dtype = reduce(torch.promote_types, dtypes)
        self._device = parts[0].own.bt.device
        self._is_cuda = self._device.type == "cuda"
        is_linear = all(p.own.layer == "linear" and not p.resident.tokens for p in parts)
        has_factors_alone = is_linear and all(_has_factors_alone(p.own) for p in parts)
        is_wide = self._dtype in _WIDE
        # Added to the output adapter by adapter: each rounding is one of the output's
        # size, so in 16 bits that is done for one product alone.
        self._is_direct = (
            is_linear
            and (is_alone or has_factors_alone)
            and (is_wide or (is_alone and has_factors_alone))
        )
        self._is_uniform = len(dtypes) == 1
        # Nothing but products, of tensors that are as they are needed.
        self._is_plain = self._is_direct and has_factors_alone and self._is_uniform
        self._is_plain &= self._spread is None

    def __call__(
        self,
        step: Step | None,
        layer: nn.Module,
        x: Shaped[Tensor, "*batch"],
        y: Float[Tensor, "*batch_out"],
        *,
        is_fresh: bool,
    ) -> Float[Tensor, "*batch_out"] | None:
        """Return the output with the effect added; None where it was added in place.

        Args:
            step: the call of the model that this is part of, None outside of one.
            layer: the layer that ran.
            x: what it was given.
            y: what it gave.
            is_fresh: whether y is contiguous memory that nobody else has seen.

        Raises:
            InputError: which rows of the batch the rows of x are is not known, or a CUDA
                graph is being captured, which would replay what acts now for good.
        """
        dtype = self._dtype
        if self._is_cuda and torch.cuda.is_current_stream_capturing():
            raise InputError(
                "a CUDA graph is being captured, and would go on with the adapters of now "
                "whatever is used later",
                where=self._sites.path(self._number),
                hint="capture inside of `with host.capturing():`",
            )
        product = self._product
        if product is not None and product.takes(x, y):
            if self._total is not None:
                self._length(step, x)
            out = y if is_fresh else y.clone(memory_format=torch.contiguous_format)
            product.add(step, x, out)
            return None if is_fresh else out
        if (
            self._is_plain
            and is_fresh
            and x.dtype is dtype
            and y.dtype is dtype
            and not torch.is_grad_enabled()
            and x.device == self._device
        ):
            if self._total is not None:
                self._length(step, x)
            for part in self._parts:
                _add_product(part, step, x, y)
            return None
        kind = x.device.type
        if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
            return self._added(step, layer, x, y, is_fresh=is_fresh)
        with torch.autocast(kind, enabled=False):
            return self._added(step, layer, x, y, is_fresh=is_fresh)

    def _added(
        self,
        step: Step | None,
        layer: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        is_fresh: bool,
    ) -> Tensor | None:
        dtype = torch.promote_types(self._dtype, y.dtype)
        if self._total is not None:
            self._length(step, x)
        if self._spread is not None:
            return self._spread.added(
                self.parts(x, dtype),
                lambda part, *tensors: _add(part, step, *tensors),
                x,
                y,
                dtype,
                where=lambda: self._sites.path(self._number),
            )
        wide = y.to(dtype)
        if not wide.is_contiguous():
            wide = wide.contiguous()
        in_place = wide is y and is_fresh and not torch.is_grad_enabled()
        if not self._is_direct:
            total = torch.zeros_like(wide)
        elif wide is y and not in_place:
            total = wide.clone()
        else:
            total = wide
        xs = x.to(dtype) if x.is_floating_point() else x
        for part in self.parts(x, dtype):
            _add(part, step, layer, xs, wide, total)
        if self._is_direct:
            return None if in_place else total.to(y.dtype)
        if in_place:
            y.add_(total)
            return None
        return (wide + total).to(y.dtype)

    def _length(self, step: Step | None, x: Tensor) -> None:
        assert self._total is not None
        check_rows(step, x, self._total, lambda: self._sites.path(self._number))

    def parts(self, x: Tensor, dtype: torch.dtype) -> list[Part]:
        """Return the parts on the device of x and in the dtype."""
        if x.device == self._device and dtype == self._dtype and self._is_uniform:
            return self._parts
        moved = self._moved
        if moved is not None and moved[0].device == x.device and moved[0].dtype == dtype:
            return moved[1]
        with torch.inference_mode(False), torch.no_grad():
            parts = [_moved(part, x.device, dtype) for part in self._parts]
            mark = torch.empty(0, device=x.device, dtype=dtype)
        if x.device.type != "meta":  # where shapes alone are tried
            self._moved = mark, parts
        return parts


def _add_product(part: Part, step: Step | None, x: Tensor, y: Tensor) -> None:
    """Add one adapter's product to y in place: the way that most layers go."""
    rows = part.rows
    if rows is None:
        shrink = part.shrink
        if shrink is not None and step is not None and x.numel() >= _MANY * x.shape[-1]:
            t = shrink.of(step, x)
            y.view(-1, y.shape[-1]).addmm_(t, part.bt, alpha=part.weight)
        # Views cost as much as a product of one token: none is made where that can be.
        elif x.dim() == 3 and len(x) == 1:
            y.baddbmm_(torch.bmm(x, part.at3), part.bt3, alpha=part.weight)
        else:
            t = torch.mm(x.reshape(-1, x.shape[-1]), part.at)
            y.view(-1, y.shape[-1]).addmm_(t, part.bt, alpha=part.weight)
        return
    where = rows.of(len(x), x.device)
    if isinstance(where, slice):
        own, out = x[where], y[where]
    else:
        own, out = x.index_select(0, where), y.index_select(0, where)
    t = torch.mm(own.reshape(-1, own.shape[-1]), part.at)
    if part.weights is not None:
        t.view(len(part.weights), -1).mul_(part.weights[:, None])
    out.view(-1, out.shape[-1]).addmm_(t, part.bt, alpha=part.weight)
    if not isinstance(where, slice):
        y.index_copy_(0, where, out)


def _add(
    part: Part, step: Step | None, layer: nn.Module, x: Tensor, y: Tensor, total: Tensor
) -> None:
    """Add what one adapter does to `total`, in any way a layer may need it."""
    where = slice(None) if part.rows is None else part.rows.of(len(x), x.device)
    add = ADDED[part.own.layer]
    if isinstance(where, slice) and not part.resident.tokens and part.weights is None:
        if part.rows is not None:
            x, y, total = x[where], y[where], total[where]
        add(part.own, layer, x, y, total, part.weight)
        return
    own, given = x[where], y[where]
    added = torch.zeros_like(given)
    if part.weights is None:
        add(part.own, layer, own, given, added, part.weight)
    else:
        t = torch.mm(own.reshape(-1, own.shape[-1]), part.at).view(len(part.weights), -1)
        t = (t * part.weights[:, None]).to(t.dtype).view(-1, part.own.rank)
        added.view(-1, added.shape[-1]).addmm_(t, part.bt, alpha=part.weight)
    if part.resident.tokens:
        added = added.masked_fill(~_awake(part.resident, step, total)[where], 0)
    if isinstance(where, slice):
        total[where] += added
    else:
        total.index_add_(0, where, added)


def _awake(resident: Resident, step: Step | None, y: Tensor) -> Tensor:
    if step is None:
        raise by_itself(resident.name)
    return gate(step.awake[resident.tokens], y, where=resident.name)


def _parts(entry: Entry, own: Factors, number: int) -> list[Part]:
    rows, resident = entry.rows, entry.resident
    if entry.weights is None:
        shrink = shrink_of(resident, number) if rows is None else None
        return [Part(resident, own, rows, entry.weight, None, shrink)]
    assert rows is not None
    # In float16 a product times its weight could be none that it can hold.
    is_product = own.layer == "linear" and own.bt.dtype != torch.float16
    if is_product and _has_factors_alone(own) and not resident.tokens:
        return [Part(resident, own, rows, entry.weight, entry.weights)]
    by_weight: dict[float, list[int]] = {}
    for row, weight in zip(rows, entry.weights.tolist(), strict=True):
        by_weight.setdefault(weight, []).append(row)
    return [
        Part(resident, own, Rows(some, rows.total), weight)
        for weight, some in by_weight.items()
    ]


def _has_factors_alone(own: Factors) -> bool:
    return own.p is None and own.q is None and own.bias is None and own.bias_scale is None


def _moved(part: Part, device: torch.device, dtype: torch.dtype) -> Part:
    tensors: dict[str, Any] = {
        name: None
        if (found := getattr(part.own, name)) is None
        else found.to(device, dtype)
        for name in ("a", "bt", "p", "q", "bias", "bias_scale")
    }
    own = replace(part.own, **tensors)
    return part.with_own(own)
