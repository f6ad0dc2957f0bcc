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
from lora_hub.runtime.resident import Factors, Resident
from lora_hub.runtime.route import Entry, Route, Rows
from lora_hub.runtime.shrink import Shrink, shrink_of
from lora_hub.runtime.sites import Sites
from lora_hub.runtime.step import Step

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
    """

    __slots__ = (
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
        self.weights = weights
        self.shrink = shrink
        self.at, self.bt = own.a.mT, own.bt
        self.at3, self.bt3 = self.at[None], own.bt[None]


class Effect:
    """What a route does at one site; None of it changes once it is made.

    Attributes:
        is_nothing: whether no adapter of the route has this site.
    """

    __slots__ = (
        "_device",
        "_dtype",
        "_is_direct",
        "_is_plain",
        "_is_uniform",
        "_moved",
        "_number",
        "_parts",
        "_sites",
        "_total",
        "is_nothing",
    )

    def __init__(self, route: Route, number: int, sites: Sites) -> None:
        parts = [
            part for entry, own in route.at(number) for part in _parts(entry, own, number)
        ]
        self.is_nothing = not parts
        self._number = number
        self._sites = sites
        self._total = route.total
        self._moved: tuple[Tensor, list[Part]] | None = None
        self._set(parts, is_alone=route.is_alone)

    @property
    def dtype(self) -> torch.dtype:
        """The widest of its factors."""
        return self._dtype

    def _set(self, parts: Sequence[Part], *, is_alone: bool) -> None:
        self._parts = list(parts)
        if not parts:
            return
        dtypes = {part.own.bt.dtype for part in parts}
        self._dtype = reduce(torch.promote_types, dtypes)
        self._device = parts[0].own.bt.device
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
            InputError: which rows of the batch the rows of x are is not known.
        """
        dtype = self._dtype
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
        """Refuse an input whose rows are not known to be those of the batch."""
        length, total = x.shape[0] if x.dim() else 0, self._total
        if length == total:
            return
        is_flat = x.dim() == (2 if x.is_floating_point() else 1)
        shape = () if step is None else step.shape
        if is_flat and len(shape) == 2 and length == shape[0] * shape[1]:
            return
        raise InputError(
            f"the layer was given {list(x.shape)}, and {total} rows have adapters of their "
            "own, so which of them these are is not known",
            where=self._sites.path(self._number),
            hint="give the model as many rows as there are entries; each=... where one "
            "entry stands for several rows, as with beams or num_return_sequences",
        )

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
        t = (t * part.weights[:, None]).view(-1, part.own.rank)
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
    if _has_factors_alone(own) and own.layer == "linear" and not resident.tokens:
        weights = entry.weights.to(own.bt.dtype).to(own.bt.device)
        return [Part(resident, own, rows, entry.weight, weights)]
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
    weights = None if part.weights is None else part.weights.to(device, dtype)
    return Part(part.resident, own, part.rows, part.weight, weights)
