"""A weight some of whose rows are new ones, without a copy of the others.

Embeddings look rows up, and a head multiplies with all of them: `NewRows` does both with
the model's own weight and puts in what the new rows give. So trained tokens cost their own
rows, not a table for each adapter.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from lora_hub.runtime.lazy import Answer, Exact, Lazy, lazy


@dataclass(frozen=True, slots=True, eq=False)
class NewRows:
    """A matrix with other rows in the place of some.

    Attributes:
        own: as the model stores it.
        rows: their numbers, ascending.
        new: one for each of `rows`, in the dtype of `own`.
    """

    own: Float[Tensor, "all columns"]
    rows: Int[Tensor, " some"]
    new: Float[Tensor, "some columns"]

    def dense(self) -> Tensor:
        """Return the matrix with the new rows in it."""
        return self.own.index_copy(0, self.rows, self.new)

    def answer(self, func: Any) -> Answer | None:
        return _ANSWERS.get(func)


def with_rows(own: Tensor, rows: Tensor, new: Tensor) -> Lazy:
    """Return the matrix with the new rows; see `NewRows`."""
    return lazy(NewRows(own, rows, new))


def _embedding(
    func: Any,
    ids: Any,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    *rest: Any,
    **kwargs: Any,
) -> Any:
    """Answer the rows of the matrix that `ids` names."""
    form = weight.form if isinstance(weight, Lazy) else None
    if not isinstance(form, NewRows) or max_norm is not None or isinstance(ids, Lazy):
        return NotImplemented  # a largest norm is written into the matrix
    y = func(ids, form.own, padding_idx, None, *rest, **kwargs)
    place = torch.searchsorted(form.rows, ids.contiguous())
    place = place.clamp_(max=len(form.rows) - 1)
    is_new = (form.rows[place] == ids).unsqueeze(-1)
    return torch.where(is_new, form.new[place], y)


def _linear(func: Any, x: Any, weight: Any, bias: Any = None) -> Any:
    """Answer `x·Mᵀ + bias`."""
    form = weight.form if isinstance(weight, Lazy) else None
    if not isinstance(form, NewRows) or isinstance(x, Lazy) or isinstance(bias, Lazy):
        return NotImplemented
    y = func(x, form.own, bias)
    columns = func(x, form.new, None if bias is None else bias[form.rows])
    with Exact(y):
        if torch.is_grad_enabled():
            return y.index_copy(-1, form.rows, columns)
        return y.index_copy_(-1, form.rows, columns)


_ANSWERS: Mapping[Any, Answer] = {
    functional.embedding: _embedding,
    functional.linear: _linear,
}
