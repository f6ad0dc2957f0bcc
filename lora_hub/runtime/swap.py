"""A parameter of a module that is another one while the module runs, and only then.

For what no hook on the output can do: replaced tensors, rows of them, and experts, whose
module reads its weights in its own way. A hook before the module's forward puts the new
tensor in the parameter's place; one after it, which is called whatever happens, puts the
parameter back. The `Parameter` itself is never written to, and outside of a forward the
module holds it as ever.
"""

import functools
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from lora_hub.adapter.adapter import Replaced
from lora_hub.adapter.layout import from_matrix, to_matrix
from lora_hub.adapter.update import Update
from lora_hub.composing.linear import Term
from lora_hub.errors import InputError
from lora_hub.runtime.added import by_groups
from lora_hub.runtime.layers import Place

_P = ParamSpec("_P")


def _uncompiled(hook: Callable[_P, None]) -> Callable[_P, None]:
    """Return the hook so that torch.compile leaves it as it is.

    It sees neither threads nor a tensor that is kept. `torch.compiler.disable` takes a
    second and 80 MB to import, so it waits until somebody compiles.
    """

    @functools.wraps(hook)
    def called(*args: _P.args, **kwargs: _P.kwargs) -> None:
        if "torch._dynamo" not in sys.modules:
            return hook(*args, **kwargs)
        if hook not in _disabled:
            disable = torch.compiler.disable
            _disabled[hook] = disable(hook)  # type: ignore[no-untyped-call]
        return _disabled[hook](*args, **kwargs)

    return called


# hook → the same, as torch.compile is told to leave it
_disabled: dict[Callable[..., None], Callable[..., None]] = {}


@dataclass(frozen=True, slots=True)
class Part:
    """What one adapter changes of a tensor that is swapped.

    Attributes:
        weight: of the adapter.
        replaced: what takes the tensor's place, or that of some rows; None where nothing.
        scales: an update whose p and q act on the tensor, on a bias its bias_scale; its
            factors have no say.
    """

    weight: float
    replaced: Replaced | None = None
    scales: Update | None = None


class Swap:
    """New numbers for a parameter or a buffer of one module, as a pair of hooks.

    What replaces the tensor is computed once and kept until the tensor changes; what
    experts' factors add is computed in each forward and not kept, as it is large.

    Args:
        place: which tensor.
        parts: what replaces it, in the order of the adapters.
        terms: experts' updates and their weights.
    """

    def __init__(
        self, place: Place, parts: Sequence[Part] = (), terms: Sequence[Term] = ()
    ) -> None:
        self.place = place
        self._parts = tuple(parts)
        self._terms = tuple(_folded(update, weight, place) for update, weight in terms)
        # For each open forward its thread and what to put back.
        self._held: list[tuple[int, Tensor | None]] = []
        self._kept: tuple[tuple[int, int, torch.device, torch.dtype], Tensor] | None = None

    @property
    def is_finite(self) -> bool:
        """Whether every number fits in the dtype it is put in."""
        own = self.place.tensor
        if not all(bool(b.isfinite().all()) for _, b in self._terms):
            return False
        if not self._parts or own.is_meta or not own.is_floating_point():
            return True
        return bool(self._replaced(own).isfinite().all())

    @_uncompiled
    def before(self, module: nn.Module, _args: object) -> None:
        """Put the new tensor in; called by torch before the forward.

        Raises:
            InputError: another thread is in the module's forward, and the end of one would
                take the tensor from under the other.
        """
        home, name = _home(module, self.place.name), self.place.name
        thread = threading.get_ident()
        if any(other != thread for other, _ in self._held):
            raise InputError(
                "the model is called by two threads at once, while an adapter is used that "
                f"replaces or changes the {name} of a {type(module).__name__}",
                hint="call the model from one thread at a time",
            )
        own = home[name]
        self._held.append((thread, own))
        assert own is not None
        if len(self._held) == 1:  # a forward inside a forward finds it in place
            home[name] = self._value(own)

    @_uncompiled
    def after(self, module: nn.Module, _args: object, _output: object) -> None:
        """Put the parameter back; called by torch after a forward, also a failed one."""
        if self._held and self._held[-1][0] == threading.get_ident():
            _home(module, self.place.name)[self.place.name] = self._held.pop()[1]

    def restore(self) -> None:
        """Put the parameter back whatever was left open, as by an interrupt."""
        if self._held:
            _home(self.place.module, self.place.name)[self.place.name] = self._held[0][1]
            self._held.clear()

    def _value(self, own: Tensor) -> Tensor:
        value = self._replaced(own) if self._parts else own
        return _with_factors(value, self._terms, self.place) if self._terms else value

    def _replaced(self, own: Tensor) -> Tensor:
        version = 0 if own.is_inference() else own._version  # noqa: SLF001
        now = own.data_ptr(), version, own.device, own.dtype
        if own.is_meta or self._kept is None or self._kept[0] != now:
            with torch.inference_mode(False), torch.no_grad():
                value = replaced_by(own.detach(), self._parts, self.place)
                if value.is_inference():  # could not be used in training afterwards
                    value = value.clone()
            if own.is_meta:  # where shapes alone are tried
                return value
            self._kept = now, value
        return self._kept[1]


def replaced_by(
    own: Shaped[Tensor, "*shape"], parts: Sequence[Part], place: Place
) -> Shaped[Tensor, "*shape"]:
    """Return `W + Σ wᵢ·changeᵢ` in the dtype of W, computed in float32 or wider.

    Where one part replaces with weight 1 and nothing else acts, its bits in that dtype.
    """
    first = parts[0]
    if len(parts) == 1 and first.weight == 1 and first.scales is None:
        return _replaced_in(own, first)
    wide = own.to(torch.promote_types(own.dtype, torch.float32))
    # As (1 - Σw)·W + Σ w·W', so that rows of weight 1 are the new ones without rounding.
    rest = torch.ones(own.shape[:1], dtype=torch.float64)
    total = torch.zeros_like(wide)
    for part in parts:
        if part.replaced is not None:
            rows = _rows(part.replaced, own)
            rest[rows.cpu()] -= part.weight
            new = part.replaced.tensor.to(wide.device, wide.dtype)
            total[rows] += part.weight * new
        if part.scales is not None:
            total += part.weight * _scaled(_replaced_in(wide, part), part.scales, place)
    kept = rest.to(wide.dtype).to(wide.device).reshape(-1, *(1,) * (wide.dim() - 1))
    return (total + kept * wide).to(own.dtype)


def _replaced_in(own: Tensor, part: Part) -> Tensor:
    """Return the tensor as this part alone replaces it, in its dtype."""
    if part.replaced is None:
        return own
    new = part.replaced.tensor.to(own.device, own.dtype)
    if part.replaced.rows is None:
        return new
    return own.index_copy(0, _rows(part.replaced, own), new)


def _rows(replaced: Replaced, own: Tensor) -> Tensor:
    rows = range(own.shape[0]) if replaced.rows is None else replaced.rows
    return torch.tensor(list(rows), device=own.device, dtype=torch.int64)


def _scaled(weight: Tensor, update: Update, place: Place) -> Tensor:
    """Return what p and q add to the weight as it is stored, or bias_scale to a bias."""
    if weight.dim() == 1:
        assert update.bias_scale is not None
        return update.bias_scale.to(weight.dtype).to(weight.device) * weight
    matrix = to_matrix(weight, update.layer, is_transposed=place.is_transposed)
    change = torch.zeros_like(matrix)
    if update.p is not None:
        change += update.p[:, None].to(matrix.dtype).to(matrix.device) * matrix
    if update.q is not None:
        q = update.q.to(matrix.dtype).to(matrix.device)
        is_conv = update.layer == "conv"  # whose groups have columns of their own
        columns = by_groups(place.module, q).flatten(start_dim=1) if is_conv else q
        change += matrix * columns
    return from_matrix(
        change, tuple(weight.shape), update.layer, is_transposed=place.is_transposed
    )


def _folded(update: Update, weight: float, place: Place) -> tuple[Tensor, Tensor]:
    """Return a and b with the scaling in b, in float32 or wider, beside the tensor."""
    device, own = place.tensor.device, place.tensor.dtype
    compute = torch.promote_types(own, torch.float32)
    fold = torch.promote_types(compute, torch.promote_types(update.a.dtype, update.b.dtype))
    scaling = update.scaled(weight).scaling.to(fold).to(update.b.device)
    a, b = update.a.to(fold), update.b.to(fold) * scaling
    if device.type == "meta":
        return a, b
    return a.to(device), b.to(device)


def _with_factors(
    value: Tensor, terms: Sequence[tuple[Tensor, Tensor]], place: Place
) -> Tensor:
    """Return the experts' weight with the factors' changes in it, in its dtype."""
    matrix = to_matrix(value, "experts", is_transposed=place.is_transposed)
    total = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    for a, b in terms:
        total = torch.baddbmm(
            total, b.to(total.device, total.dtype), a.to(total.device, total.dtype)
        )
    return from_matrix(
        total.to(value.dtype),
        tuple(value.shape),
        "experts",
        is_transposed=place.is_transposed,
    )


def _home(module: nn.Module, name: str) -> dict[str, Any]:
    """Return the dictionary of the module that holds the tensor.

    Written to past `Module.__setattr__`, which takes parameters alone and moves names.
    """
    return (
        module._parameters if name in module._parameters else module._buffers  # noqa: SLF001
    )
