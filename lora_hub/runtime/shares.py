"""Which part of what a layer is given and gives one process has: tensor parallelism.

It is read off the tensors themselves: a DTensor says how it is laid out, of others the
sizes tell. A part is that of `torch.chunk`, as DTensor has it. What is done with the parts
stands in `sharded.py`.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_hub.errors import InputError

HINT = (
    "layers may be spread by ColwiseParallel and RowwiseParallel, over a mesh of one axis"
)


def is_spread(tensor: object) -> bool:
    """Return whether it is a DTensor, whose own numbers are a part of it."""
    # Without importing what takes a second: who has such a tensor has imported it.
    kind = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return kind is not None and isinstance(tensor, kind)


@dataclass(frozen=True, slots=True, eq=False)
class Whole:
    """A layer in one piece, and the mesh of one axis that it is spread over.

    Attributes:
        inp, out: its features.
    """

    mesh: Any
    inp: int
    out: int
    is_embedding: bool

    def share(self, size: int) -> slice:
        """Return which of so many features, or tokens, this process has."""
        each = -(-size // self.mesh.size())  # as torch.chunk; the last may have fewer
        begin = min(size, each * self.mesh.get_local_rank())
        return slice(begin, min(size, begin + each))


@dataclass(frozen=True, slots=True, eq=False)
class Laid:
    """What this process has of what a layer is given and gives.

    Attributes:
        x, y: this process's own numbers.
        inputs, outputs: of which features they are, None for all.
        tokens: (axis, which) of the tokens that y has of those of x; () for all.
        given: y as the layer gave it.
    """

    x: Tensor
    y: Tensor
    inputs: slice | None
    outputs: slice | None
    tokens: tuple[tuple[int, slice], ...]
    given: Any

    @classmethod
    def of(cls, whole: Whole, x: Tensor, y: Tensor, where: Callable[[], str]) -> "Laid":
        """Return how they are laid out.

        Raises:
            InputError: that cannot be told.
        """
        of_x = "all" if whole.is_embedding else _features(whole, x, whole.inp)
        of_y = _features(whole, y, whole.out)
        own_x, own_y = _own(x), _own(y)
        lead = own_x.shape if whole.is_embedding else own_x.shape[:-1]
        tokens = _tokens(whole, tuple(lead), tuple(own_y.shape[:-1]))
        if of_x is None or of_y is None or tokens is None:
            raise InputError(
                f"the layer is spread over {whole.mesh.size()} processes; it was given "
                f"{_told(x)} and gave {_told(y)}, so which part of its output this is, is "
                "not known",
                where=where(),
                hint=HINT,
            )
        is_split = of_y == "part" or bool(tokens)
        if torch.is_grad_enabled() and of_x == "all" and own_x.is_floating_point():
            if is_spread(x):
                own_x = _own(x, is_partial=is_split)
            elif is_split:
                own_x = entering(whole.mesh, own_x)
        return cls(
            own_x,
            own_y,
            whole.share(whole.inp) if of_x == "part" else None,
            whole.share(whole.out) if of_y == "part" else None,
            tokens,
            y,
        )

    def of_tokens(self, x: Tensor) -> Tensor:
        """Return those of the tokens that y has."""
        for axis, which in self.tokens:
            x = x.narrow(axis, which.start, which.stop - which.start)
        return x

    def spread_again(self, y: Tensor) -> Tensor:
        """Return the tensor laid out as the output was."""
        if not is_spread(self.given):
            return y
        kind: Any = type(self.given)
        found: Tensor = kind.from_local(
            y,
            self.given.device_mesh,
            self.given.placements,
            run_check=False,
            shape=self.given.shape,
            stride=self.given.stride(),
        )
        return found


def _features(whole: Whole, tensor: Any, size: int) -> str | None:
    """Return whether it has "all" features or a "part", None where that is not known."""
    last = tensor.shape[-1] if tensor.dim() else 0
    if not is_spread(tensor):
        share = whole.share(size)
        part = share.stop - share.start
        return "all" if last == size else "part" if last == part else None
    if tensor.device_mesh != whole.mesh or last != size:
        return None
    (placement,) = tensor.placements
    if type(placement).__name__ not in ("Shard", "Replicate"):
        return None
    is_part = placement.is_shard() and placement.dim % tensor.dim() == tensor.dim() - 1
    return "part" if is_part else "all"


def _tokens(
    whole: Whole, given: tuple[int, ...], got: tuple[int, ...]
) -> tuple[tuple[int, slice], ...] | None:
    """Return which tokens of those given the output has, None where that is not known."""
    other = [
        axis for axis, pair in enumerate(zip(given, got, strict=False)) if len({*pair}) > 1
    ]
    if len(given) != len(got) or len(other) > 1:
        return None
    # The first axis is that of the rows, which have adapters of their own.
    if not other:
        return ()
    (axis,) = other
    which = whole.share(given[axis])
    if axis == 0 or which.stop - which.start != got[axis]:
        return None
    return ((axis, which),)


def _own(tensor: Any, *, is_partial: bool = False) -> Tensor:
    """Return this process's own numbers; those on their way are waited for when read."""
    if is_spread(tensor):
        module: Any = sys.modules["torch.distributed.tensor"]
        partial = [module.Partial()] if is_partial else None
        tensor = tensor.to_local(grad_placements=partial)
    assert isinstance(tensor, Tensor)
    return tensor


def entering(mesh: Any, x: Tensor) -> Tensor:
    """Return x, of whose gradient each process will have a part, to be summed."""
    tensor: Any = sys.modules["torch.distributed.tensor"]
    whole = tensor.DTensor.from_local(x, mesh, [tensor.Replicate()], run_check=False)
    found: Tensor = whole.to_local(grad_placements=[tensor.Partial()])
    return found


def summed(mesh: Any, own: Tensor) -> Tensor:
    """Return the sum over the processes; its gradient is that of each term."""
    if torch.is_grad_enabled() and own.requires_grad:
        tensor: Any = sys.modules["torch.distributed.tensor"]
        spread = tensor.DTensor.from_local(own, mesh, [tensor.Partial()], run_check=False)
        return _own(spread.redistribute(placements=[tensor.Replicate()]))
    own = own.contiguous()
    torch.distributed.all_reduce(own, group=mesh.get_group())
    return own


def _told(tensor: Any) -> str:
    placed = f" as {list(tensor.placements)}" if is_spread(tensor) else ""
    return f"{list(tensor.shape)}{placed}"
