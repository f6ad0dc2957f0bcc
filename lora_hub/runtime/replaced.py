"""The tensor that stands in a replaced one's place, for adapters that act together.

Each adapter acts as it alone would: `W + Σ wᵢ·(Wᵢ - W)`, where Wᵢ is the tensor as adapter
i alone makes it, with its own scaling (p, q; of a bias bias_scale) of what it alone
replaces. So where an adapter replaces a tensor, those scalings of all that act go into the
tensor, and out of what is added to the layer's output (`dropped_of`).
"""

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Shaped
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from lora_hub.adapter.adapter import Replaced
from lora_hub.adapter.layout import from_matrix, to_matrix
from lora_hub.runtime.added import by_groups, is_conv1d
from lora_hub.runtime.new_rows import with_rows
from lora_hub.runtime.resident import Factors
from lora_hub.runtime.route import Set

KEPT = 8  # new tensors kept for one tensor of the model; each may be as large as it


@dataclass(frozen=True, slots=True)
class Part:
    """What one adapter changes of a tensor that is replaced.

    Attributes:
        weight: of the adapter.
        replaced: what takes the tensor's place, or that of some rows; None where nothing.
        scales: an update whose p and q act on the tensor, on a bias its bias_scale; its
            factors have no say.
    """

    weight: float
    replaced: Replaced | None = None
    scales: Factors | None = None

    @property
    def is_as_brought(self) -> bool:
        """Whether, alone, it gives the adapter's own tensor and needs none of the base."""
        whole = self.replaced is not None and self.replaced.rows is None
        return whole and self.weight == 1 and self.scales is None


@dataclass(frozen=True, slots=True)
class _New:
    """A new tensor, or new rows of one and which they are."""

    numbers: Tensor
    rows: Tensor | None = None


def parts_of(acting: Set, module: nn.Module, site: int | None) -> dict[str, list[Part]]:
    """Return name → parts of those tensors of the module that are replaced, or scaled.

    Where a bias is replaced and its layer's rows are scaled (p), so is the weight: what p
    scales cannot be told from the output any more.

    Args:
        acting: adapters and their weights.
        module: whose tensors.
        site: its number among the layers that are added to.
    """
    parts: dict[str, list[Part]] = {}
    for name in names_of(module):
        for resident, weight in acting:
            new = resident.replaced.get((module, name))
            if new is not None:
                update = None if site is None else resident.at.get(site)
                scales = _scales(update, name, is_weight_new=True)
                parts.setdefault(name, []).append(Part(weight, new, scales))
    is_weight_new, is_bias_new = "weight" in parts, "bias" in parts
    if site is None or not (is_weight_new or is_bias_new):
        return parts
    for resident, weight in acting:
        update = resident.at.get(site)
        for name in ("weight", "bias"):
            if (module, name) in resident.replaced or (name == "bias" and not is_bias_new):
                continue
            scales = _scales(update, name, is_weight_new=is_weight_new)
            if scales is not None:
                parts.setdefault(name, []).append(Part(weight, scales=scales))
    return parts


def names_of(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the module's own parameters and buffers."""
    return *module._parameters, *module._buffers  # noqa: SLF001  (no walk over children)


def dropped_of(acting: Set, module: nn.Module) -> frozenset[str]:
    """Return which of p, q and bias_scale are in the tensors and not to be added."""
    names = {
        name
        for name in names_of(module)
        if any((module, name) in resident.replaced for resident, _ in acting)
    }
    dropped = frozenset({"p", "q"} if "weight" in names else ())
    return dropped | ({"p", "bias_scale"} if "bias" in names else frozenset())


def replaced_by(
    own: Shaped[Tensor, "*shape"], parts: Sequence[Part], module: nn.Module
) -> Shaped[Tensor, "*shape"]:
    """Return `W + Σ wᵢ·(Wᵢ - W)` in the dtype of W, computed in float32 or wider.

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
            total += part.weight * _scaled(_replaced_in(wide, part), part.scales, module)
    kept = rest.to(wide.dtype).to(wide.device).reshape(-1, *(1,) * (wide.dim() - 1))
    return (total + kept * wide).to(own.dtype)


class Kept:
    """New tensors of one tensor of the model, by what acts; the last `KEPT` of them.

    Known by the adapters' identities and weights, and made anew when the model's own
    tensor is another one or was changed. An adapter's own tensor is not kept, so that
    nothing here holds an adapter that was let go; of new rows, only the rows are.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._lock = threading.Lock()
        self._made: OrderedDict[object, tuple[object, _New]] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept."""
        with self._lock:
            return sum(new.numbers.nbytes for _, new in self._made.values())

    def tensor(self, own: Tensor, acting: Set, parts: Sequence[Part]) -> Tensor:
        """Return the new tensor; of new rows a lazy one (`new_rows.py`).

        Args:
            own: the tensor it stands for, as it is now.
            acting: the adapters whose parts they are, with their weights.
            parts: from `parts_of`, at least one.
        """
        new = self._new(own, acting, parts)
        return new.numbers if new.rows is None else with_rows(own, new.rows, new.numbers)

    def is_finite(self, own: Tensor, acting: Set, parts: Sequence[Part]) -> bool:
        """Return whether every new number is."""
        return bool(self._new(own, acting, parts).numbers.isfinite().all())

    def _new(self, own: Tensor, acting: Set, parts: Sequence[Part]) -> _New:
        if len(parts) == 1 and parts[0].is_as_brought:
            brought = parts[0].replaced
            assert brought is not None
            if (brought.tensor.dtype, brought.tensor.device) == (own.dtype, own.device):
                return _New(brought.tensor)
        key = tuple((resident.key, weight) for resident, weight in acting)
        version = 0 if own.is_inference() else own._version  # noqa: SLF001
        # The memory itself, held weakly: another tensor may come to lie where one was.
        memory = StorageWeakRef(own.untyped_storage())  # type: ignore[no-untyped-call]
        now = memory, own.storage_offset(), version, own.device, own.dtype
        with self._lock:
            found = self._made.get(key)
            if found is not None and found[0] == now:
                self._made.move_to_end(key)
                return found[1]
        with torch.inference_mode(False), torch.no_grad():
            new = _new(own.detach(), parts, self._module)
        if not own.is_meta:  # where shapes alone are tried
            with self._lock:
                self._made[key] = now, new
                while len(self._made) > KEPT:
                    self._made.popitem(last=False)
        return new


def _new(own: Tensor, parts: Sequence[Part], module: nn.Module) -> _New:
    rows = _rows_alone(own, parts, module)
    if rows is None:
        value, where = replaced_by(own, parts, module), None
    else:
        place = {row: index for index, row in enumerate(rows)}
        where = torch.tensor(rows, device=own.device)
        some = [
            Part(part.weight, replace(part.replaced, rows=_moved(part.replaced, place)))
            for part in parts
            if part.replaced is not None
        ]
        value = replaced_by(own[where], some, module)
    if value.is_inference():  # could not be used in training afterwards
        value = value.clone()
    return _New(value, where)


def _rows_alone(
    own: Tensor, parts: Sequence[Part], module: nn.Module
) -> tuple[int, ...] | None:
    """Return the rows that are new, ascending; None where more than rows is."""
    if own.dim() != 2 or not isinstance(module, nn.Embedding | nn.Linear):
        return None
    found: set[int] = set()
    for part in parts:
        if part.scales is not None or part.replaced is None or part.replaced.rows is None:
            return None
        found.update(part.replaced.rows)
    return tuple(sorted(found)) or None


def _moved(replaced: Replaced, place: Mapping[int, int]) -> tuple[int, ...]:
    return tuple(place[row] for row in replaced.rows or ())


def _scales(update: Factors | None, name: str, *, is_weight_new: bool) -> Factors | None:
    """Return what of the update scales the tensor of this name, None where nothing does."""
    if update is None:
        return None
    if name == "bias":
        return None if update.bias_scale is None else update
    if name != "weight":
        return None
    if not is_weight_new:  # q acts on the weight as ever; p would see the new bias
        update = replace(update, q=None)
    return None if update.p is None and update.q is None else update


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


def _scaled(weight: Tensor, update: Factors, module: nn.Module) -> Tensor:
    """Return what p and q add to the weight as it is stored, or bias_scale to a bias."""
    if weight.dim() == 1:
        assert update.bias_scale is not None
        return update.bias_scale.to(weight.dtype).to(weight.device) * weight
    is_transposed = update.layer == "embedding" or is_conv1d(module)
    matrix = to_matrix(weight, update.layer, is_transposed=is_transposed)
    change = torch.zeros_like(matrix)
    if update.p is not None:
        change += update.p[:, None].to(matrix.dtype).to(matrix.device) * matrix
    if update.q is not None:
        q = update.q.to(matrix.dtype).to(matrix.device)
        is_conv = update.layer == "conv"  # whose groups have columns of their own
        columns = by_groups(module, q).flatten(start_dim=1) if is_conv else q
        change += matrix * columns
    return from_matrix(
        change, tuple(weight.shape), update.layer, is_transposed=is_transposed
    )
