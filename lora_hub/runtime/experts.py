"""Experts' weights with adapters' changes in them, without making a change dense.

A `LowRank` tensor answers what models do with their experts: it picks some, turns the
matrix, and multiplies. Each product is that of the model's own weight plus two small ones,
so what it costs are factors and activations, whatever way the model goes over its experts
(one by one, gathered, or grouped).

    M = W + Σ wᵢ·leftᵢᵀ·rightᵢ        x·M = x·W + Σ wᵢ·(x·leftᵢᵀ)·rightᵢ

A matrix stored as (in, out) has `a` on its left; one stored as (out, in) has it on its
right. To turn M is to turn W and to exchange the two.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from lora_hub.runtime.lazy import Answer, Exact, Lazy, dense, lazy

_ALIGNED_BYTES = 16  # what grouped products of a GPU ask of a row


@dataclass(frozen=True, slots=True, eq=False)
class Term:
    """One adapter's change of the matrices: `weight · leftᵀ · right`."""

    weight: float
    left: Float[Tensor, "*experts rank rows"]
    right: Float[Tensor, "*experts rank columns"]

    def map(self, of: Callable[[Tensor], Tensor]) -> "Term":
        return Term(self.weight, of(self.left), of(self.right))

    @property
    def turned(self) -> "Term":
        return Term(self.weight, self.right, self.left)


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """A matrix, or one for each expert, with low-rank changes that stay apart.

    Attributes:
        own: as the model stores it.
        terms: at least one, in the dtype that is computed in.
    """

    own: Float[Tensor, "*experts rows columns"]
    terms: tuple[Term, ...]

    def dense(self) -> Tensor:
        """Return the matrix with its changes in it, summed in float32 or wider."""
        wide = torch.promote_types(self.own.dtype, torch.float32)
        for term in self.terms:
            wide = torch.promote_types(wide, term.left.dtype)
        with Exact(self.own):
            total = self.own.to(wide)
            for term in self.terms:
                left, right = (each.to(total) for each in (term.left, term.right))
                total = total + term.weight * (left.mT @ right)
        return total.to(self.own.dtype)

    def answer(self, func: Any) -> Answer | None:
        return _ANSWERS.get(func) or _BY_NAME.get(str(func))


def changed(own: Float[Tensor, "*experts rows columns"], terms: Sequence[Term]) -> Lazy:
    """Return the matrix with the changes; of a lazy one, that with these changes too."""
    return lazy(LowRank(dense(own), tuple(terms)))


def _low_rank(value: Any) -> LowRank | None:
    form = value.form if isinstance(value, Lazy) else None
    return form if isinstance(form, LowRank) else None


def _plus(y: Tensor, changes: Sequence[tuple[float, Tensor, Tensor]]) -> Tensor:
    """Return y, which nobody else has, plus each weight times its product.

    Summed in the wider of the dtypes, rounded once to that of y.
    """
    wide = y.dtype
    for _, one, _ in changes:
        wide = torch.promote_types(wide, one.dtype)
    in_place = not torch.is_grad_enabled()
    total = y.to(wide)
    for weight, *product in changes:
        one, two = (each.to(wide) for each in product)
        axes = {each.dim() for each in (total, one, two)}
        if axes == {2}:
            add = total.addmm_ if in_place else total.addmm
            total = add(one, two, alpha=weight)
        elif axes == {3}:
            add_each = total.baddbmm_ if in_place else total.baddbmm
            total = add_each(one, two, alpha=weight)
        else:
            total = total + weight * (one @ two)
    return total.to(y.dtype)


def _meeting(x: Tensor, term: Term, y: Tensor) -> tuple[Tensor, Term]:
    """Return the input and the factors in the dtype that is computed in, beside y."""
    wide = torch.promote_types(y.dtype, term.left.dtype)
    return x.to(wide), term.map(lambda each: each.to(y.device, wide))


def _matmul(func: Any, one: Any, two: Any, **kwargs: Any) -> Any:
    """Answer `one @ two`, of which one is changed."""
    if kwargs or (isinstance(one, Lazy) and isinstance(two, Lazy)):
        return NotImplemented
    matrix = _low_rank(two)
    if matrix is not None:
        y = func(one, matrix.own)
        with Exact(y):
            changes = []
            for term in matrix.terms:
                x, own = _meeting(one, term, y)
                changes.append((own.weight, x @ own.left.mT, own.right))
            return _plus(y, changes)
    matrix = _low_rank(one)
    assert matrix is not None
    y = func(matrix.own, two)
    with Exact(y):
        changes = []
        for term in matrix.terms:
            x, own = _meeting(two, term, y)
            changes.append((own.weight, own.left.mT, own.right @ x))
        return _plus(y, changes)


def _matmul_turned(func: Any, two: Any, one: Any) -> Any:
    """Answer `__rmatmul__`, whose left side comes second."""
    return _matmul(torch.matmul, one, two)


def _linear(func: Any, x: Any, weight: Any, bias: Any = None) -> Any:
    """Answer `x·Mᵀ + bias`."""
    matrix = _low_rank(weight)
    if matrix is None or isinstance(x, Lazy) or isinstance(bias, Lazy):
        return NotImplemented
    y = func(x, matrix.own, bias)
    with Exact(y):
        changes = []
        for term in matrix.terms:
            wide, own = _meeting(x, term, y)
            changes.append((own.weight, wide @ own.right.mT, own.left))
        return _plus(y, changes)


def _grouped(func: Any, x: Any, weight: Any, *rest: Any, **kwargs: Any) -> Any:
    """Answer a product of which consecutive rows of x meet one expert each.

    `offs` tells for each expert where its rows end; rows after the last are no one's, and
    what stands there is undefined, as in the product itself.
    """
    offs = kwargs.get("offs", rest[0] if len(rest) == 1 else None)
    others = {key for key, value in kwargs.items() if value is not None and key != "offs"}
    matrix = _low_rank(weight)
    if matrix is None or isinstance(x, Lazy) or offs is None or others or len(rest) > 1:
        return NotImplemented
    if x.dim() != 2 or matrix.own.dim() != 3:
        return NotImplemented
    y = func(x, matrix.own, *rest, **kwargs)
    with Exact(y):
        wide = y
        for term in matrix.terms:
            wide = wide.to(torch.promote_types(wide.dtype, term.left.dtype))
            each, own = _meeting(x, term, wide)
            small = _by_expert(each, own.left.mT, offs)
            wide = wide + own.weight * _by_expert(small, own.right, offs)
        return wide.to(y.dtype)


def _by_expert(
    x: Float[Tensor, "rows inp"], each: Float[Tensor, "experts inp out"], offs: Tensor
) -> Float[Tensor, "rows out"]:
    """Return rows of x times the matrix of their expert."""
    if x.is_cuda:
        return _at_once(x, each, offs)
    pieces, start = [], 0
    for expert, end in enumerate(offs.tolist()):
        if end > start:
            pieces.append(x[start:end] @ each[expert])
        start = max(start, end)
    if start < len(x):
        pieces.append(x.new_zeros(len(x) - start, each.shape[2]))
    return torch.cat(pieces) if pieces else x.new_zeros(0, each.shape[2])


def _at_once(x: Tensor, each: Tensor, offs: Tensor) -> Tensor:
    """Return the same without a look at `offs`, for which a GPU would be waited for."""
    inp, out = each.shape[1:]
    step = max(_ALIGNED_BYTES // x.element_size(), 1)
    more_in, more_out = -inp % step, -out % step
    if more_in or more_out:
        x = functional.pad(x, (0, more_in))
        each = functional.pad(each, (0, more_out, 0, more_in))
    found = functional.grouped_mm(x.contiguous(), each.contiguous(), offs=offs)
    return found[:, :out]


def _picked(func: Any, weight: Any, index: Any) -> Any:
    """Answer `M[index]` along the experts."""
    matrix = _low_rank(weight)
    if matrix is None or matrix.own.dim() != 3:
        return NotImplemented
    if isinstance(index, tuple) and index:
        first, rest = index[0], index[1:]
        if not isinstance(first, int | slice) and not (
            isinstance(first, Tensor) and not first.dim()
        ):
            return NotImplemented
        picked = _picked(func, weight, first)
        if not rest or picked is NotImplemented:
            return picked
        return dense(picked)[(slice(None), *rest) if isinstance(first, slice) else rest]
    if isinstance(index, Tensor):
        if index.dim() > 1 or index.is_floating_point():
            return NotImplemented
        if not index.dim():
            if index.dtype == torch.bool:
                return NotImplemented
            index = int(index)  # as torch does, once for all that is picked from
    elif not isinstance(index, int | slice | list) or isinstance(index, bool):
        return NotImplemented
    terms = [term.map(lambda factor: factor[index]) for term in matrix.terms]
    return changed(matrix.own[index], terms)


def _select(func: Any, weight: Any, dim: int, index: Any) -> Any:
    return _picked(func, weight, index) if dim in (0, -3) else NotImplemented


def _unbound(func: Any, weight: Any, dim: int = 0) -> Any:
    matrix = _low_rank(weight)
    if matrix is None or matrix.own.dim() != 3 or dim not in (0, -3):
        return NotImplemented
    each = [weight[expert] for expert in range(len(matrix.own))]
    return iter(each) if func is Tensor.__iter__ else tuple(each)


def _turned(func: Any, weight: Any, *axes: int, **named: int) -> Any:
    """Answer what exchanges the last two axes, and only that."""
    matrix = _low_rank(weight)
    assert matrix is not None
    count = matrix.own.dim()
    asked = axes or tuple(named.values())
    if asked and {axis % count for axis in asked} != {count - 2, count - 1}:
        return NotImplemented
    if not asked and count != 2 and func != _LAST_TWO:
        return NotImplemented
    return changed(matrix.own.mT, [term.turned for term in matrix.terms])


def _reshaped(func: Any, weight: Any, *shape: Any) -> Any:
    """Answer the view of a matrix as several, each some of its rows."""
    matrix = _low_rank(weight)
    assert matrix is not None
    sizes = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
    if not all(isinstance(size, int) for size in sizes):
        return NotImplemented
    own = func(matrix.own, sizes)
    if own.shape == matrix.own.shape:
        return changed(own, matrix.terms)
    if matrix.own.dim() != 2 or own.dim() != 3 or own.shape[2] != matrix.own.shape[1]:
        return NotImplemented
    experts, rows, _ = own.shape
    terms = [
        Term(
            term.weight,
            term.left.reshape(-1, experts, rows).transpose(0, 1),
            term.right.expand(experts, *term.right.shape),
        )
        for term in matrix.terms
    ]
    return changed(own, terms)


def _moved(func: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
    """Answer what gives the same matrix on another device, in another dtype or layout."""
    matrix = _low_rank(weight)
    if matrix is None or any(isinstance(each, Lazy) for each in args):
        return NotImplemented
    return changed(func(matrix.own, *args, **kwargs), matrix.terms)


_LAST_TWO = Tensor.mT.__get__  # type: ignore[attr-defined]

_ANSWERS: Mapping[Any, Answer] = {
    functional.linear: _linear,
    Tensor.__rmatmul__: _matmul_turned,
    functional.grouped_mm: _grouped,
    torch._grouped_mm: _grouped,  # noqa: SLF001  (what models call where the other is not)
    Tensor.__getitem__: _picked,
    **dict.fromkeys((torch.select, Tensor.select), _select),
    **dict.fromkeys((torch.index_select, Tensor.index_select), _select),
    **dict.fromkeys((torch.unbind, Tensor.unbind, Tensor.__iter__), _unbound),
    **dict.fromkeys(
        (
            *(torch.matmul, torch.bmm, torch.mm),
            *(Tensor.matmul, Tensor.bmm, Tensor.mm, Tensor.__matmul__),
        ),
        _matmul,
    ),
    **dict.fromkeys(
        (
            *(torch.transpose, torch.swapaxes, torch.swapdims, torch.t),
            *(Tensor.transpose, Tensor.swapaxes, Tensor.swapdims, Tensor.t),
            *(_LAST_TWO, Tensor.T.__get__),  # type: ignore[attr-defined]
        ),
        _turned,
    ),
    **dict.fromkeys((Tensor.view, Tensor.reshape), _reshaped),
    **dict.fromkeys(
        (
            *(Tensor.to, Tensor.contiguous, Tensor.detach, Tensor.type_as, Tensor.cpu),
            *(Tensor.cuda, Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16),
        ),
        _moved,
    ),
}
# Operators that others bring, which may not be there.
_BY_NAME: Mapping[str, Answer] = {
    "transformers.grouped_mm_fallback": _grouped,
    "transformers.grouped_mm_fallback.default": _grouped,
}
