"""A module's call taken apart by rows of the batch, and what it gave put together again.

Rows lie along the first axis, of a tensor that has the batch's rows there or rows and
tokens in one axis, each row's tokens side by side. Some modules see that axis repeated,
once for each expert (`EXPERT_MAJOR`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_hub.errors import InputError
from lora_hub.runtime.route import Rows

# Types whose input repeats all tokens once for each expert, one expert after the other.
EXPERT_MAJOR = frozenset({"Llama4TextExperts"})


class Apart:
    """One call of a module, whose rows go different ways.

    Args:
        module: what is called, for messages and for how it sees rows.
        args, kwargs: what it is called with; the first tensor tells the length of the
            axis, and all tensors of that length are taken apart with it.
        total: rows of the batch.
        shape: of what the model was given: rows and tokens, as far as it is known.
        where: what to call the module in messages.

    Raises:
        InputError: the first axis does not tell rows.
    """

    def __init__(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        total: int,
        shape: tuple[int, ...],
        where: str,
    ) -> None:
        self._args, self._kwargs, self._where = args, kwargs, where
        first = _first((args, tuple(kwargs.values())))
        self.length = len(first) if first is not None and first.dim() else 0
        flat = total * shape[1] if len(shape) > 1 else total
        self._copies = 1
        if type(module).__name__ in EXPERT_MAJOR and first is not None:
            self._copies = max(self.length // flat, 1)
        fits = {flat * self._copies} if self._copies > 1 else {total, flat}
        if (
            first is None
            or self.length not in fits
            or (first.dim() > 2 and self.length != total)
        ):
            found = "no tensor" if first is None else f"a tensor of {list(first.shape)}"
            raise InputError(
                f"the layer is given {found}, which does not tell the {total} rows of the "
                "batch",
                where=where,
                hint="give one entry for each row, each= with beams or "
                "num_return_sequences; or use one adapter for all rows",
            )
        self._device = first.device

    def index(self, rows: Rows) -> slice | Tensor:
        """Return where the rows are in the axis."""
        once = self.length // self._copies
        index = rows.of(once, self._device)
        if self._copies == 1:
            return index
        if isinstance(index, slice):
            index = torch.arange(index.start, index.stop, device=self._device)
        starts = torch.arange(self._copies, device=self._device)[:, None] * once
        return (starts + index).reshape(-1)

    def taken(self, index: slice | Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return what the module is called with, of these rows alone."""
        args = tuple(self._take(each, index) for each in self._args)
        return args, {key: self._take(each, index) for key, each in self._kwargs.items()}

    def _take(self, value: Any, index: slice | Tensor) -> Any:
        if isinstance(value, Tensor):
            return value[index] if value.dim() and len(value) == self.length else value
        if type(value) in (tuple, list):
            return type(value)(self._take(each, index) for each in value)
        return value

    def together(self, outputs: Sequence[Any], indices: Sequence[slice | Tensor]) -> Any:
        """Return the outputs as one, rows in their order.

        Raises:
            InputError: one is neither a tensor with those rows in its first axis nor a
                tuple or list of such.
        """
        sizes = [
            each.stop - each.start if isinstance(each, slice) else len(each)
            for each in indices
        ]
        return self._join(outputs, sizes, _order(indices, self._device))

    def _join(self, outputs: Sequence[Any], sizes: list[int], order: Tensor | None) -> Any:
        first = outputs[0]
        if all(isinstance(each, Tensor) for each in outputs) and all(
            each.dim() and len(each) == size
            for each, size in zip(outputs, sizes, strict=True)
        ):
            joined = torch.cat(list(outputs))
            return joined if order is None else joined.index_select(0, order)
        if type(first) in (tuple, list) and all(
            len(each) == len(first) for each in outputs
        ):
            return type(first)(
                self._join(each, sizes, order) for each in zip(*outputs, strict=True)
            )
        if all(each is None for each in outputs):
            return None
        raise InputError(
            f"the layer gives a {type(first).__name__} that cannot be put together from "
            "rows which use different adapters",
            where=self._where,
            hint="use one adapter for all rows",
        )


def _order(indices: Sequence[slice | Tensor], device: torch.device) -> Tensor | None:
    """Return where in what is joined each row is; None where all are in order."""
    if all(isinstance(each, slice) for each in indices):
        starts = [each.start for each in indices if isinstance(each, slice)]
        if starts == sorted(starts):
            return None
    flat = [
        torch.arange(each.start, each.stop, device=device)
        if isinstance(each, slice)
        else each
        for each in indices
    ]
    return torch.cat(flat).argsort()


def _first(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, tuple | list):
        for each in value:
            found = _first(each)
            if found is not None:
                return found
    return None
