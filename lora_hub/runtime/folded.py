"""An adapter's numbers written into a slab: widened, turned around, scalings folded in.

By the run (`laid_out.py`): one call for all layers that are built alike, since a call for
each of hundreds of small tensors takes longer than their numbers. All of them are then read
once, so that an adapter with numbers that are not finite is refused before it acts.
"""

from collections.abc import Sequence
from math import isfinite

import torch
from torch import Tensor

from lora_hub.adapter.update import Update
from lora_hub.errors import ComposeError
from lora_hub.runtime.laid_out import Run, Shaped

# Bytes of `b` that are folded at a time: what lies between stays in the cache.
FOLDED_BYTES = 1 << 20


def fill(run: Run, into: Tensor, updates: Sequence[Update]) -> None:
    """Write one kind of tensor of some updates, which are built alike."""
    given = [updates[index] for index in run.of]
    if not into.numel():
        return
    if run.name == "bt":
        _fold(into, [each.b for each in given], [each.scaling for each in given])
        return
    tensors = [getattr(each, run.name) for each in given]
    torch._foreach_copy_(into.unbind(), tensors)


def _fold(into: Tensor, bs: Sequence[Tensor], scalings: Sequence[Tensor]) -> None:
    """Write b transposed times its scaling into each of `into`."""
    dtype, device = into.dtype, into.device
    # To the dtype first: not every device has float64. The product is made in the widest
    # of what is given here and rounded when it is written.
    fold = torch.promote_types(torch.promote_types(dtype, torch.float32), bs[0].dtype)
    is_one = all(each is scalings[0] for each in scalings)
    front = (1,) * (bs[0].dim() - 2)
    step = max(1, FOLDED_BYTES // bs[0].nbytes)
    for begin in range(0, len(bs), step):
        some = slice(begin, begin + step)
        theirs = scalings[:1] if is_one else scalings[some]
        scaling = _stacked([each.to(fold).to(device) for each in theirs])
        scaling = scaling.view(len(scaling), *front, -1, 1)
        if bs[0].itemsize == 2 and dtype == fold:
            # Turned around while they are small; widening them is exact.
            _turn(bs[some], into[some])
            into[some].mul_(scaling)
        else:
            b = _stacked(bs[some]).mT.to(device)
            torch.mul(b, scaling, out=into[some])


def _turn(bs: Sequence[Tensor], into: Tensor) -> None:
    """Write each b transposed and widened."""
    is_paired = bs[0].dtype == torch.bfloat16 and into.dtype == torch.float32
    if not is_paired or bs[0].shape[-1] % 2 or not all(map(Tensor.is_contiguous, bs)):
        into.copy_(_stacked([each.mT for each in bs]))
        return
    # A bfloat16 is the upper half of a float32. Two columns are turned around as one of
    # int32, then taken apart, which takes half as long.
    pairs = torch.stack(tuple(bs)).view(torch.int32).mT.contiguous().to(into.device)
    bits = into.view(torch.int32)
    torch.bitwise_left_shift(pairs, 16, out=bits[..., 0::2, :])
    torch.bitwise_and(pairs, -1 << 16, out=bits[..., 1::2, :])


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0][None] if len(tensors) == 1 else torch.stack(tuple(tensors))


def measure(
    run: Run, held: Tensor, updates: Sequence[Shaped], largest: list[float]
) -> None:
    """Look at every number once; those but of `a` go into `largest`.

    Raises:
        ComposeError: one is not finite.
    """
    if not held.numel():
        return
    flat = held.flatten(1)
    # A sum of finite numbers alone is finite, and takes half as long as their largest.
    if run.name == "a" and all(map(isfinite, flat.sum(1).tolist())):
        return
    ends = torch.stack((flat.amin(1), flat.amax(1))).abs().amax(0).tolist()
    for index, end in zip(run.of, ends, strict=True):
        if not isfinite(end):
            raise ComposeError(
                f"the adapter has numbers that are not finite in {run.dtype}, which is "
                "computed in",
                where=updates[index].target,
                hint="`lorahub validate` finds NaN in adapters",
            )
        if run.name != "a":
            largest[index] = max(largest[index], end)
