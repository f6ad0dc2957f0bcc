"""What becomes of replaced tensors when adapters are composed: they are taken over, or not.

A replaced tensor acts as `W + w·(W' - W)`. Without W only those sums are known where it
falls out: one part alone with weight 1, or equal tensors whose weights add up to 1.
"""

import math
from collections.abc import Mapping, Sequence

import torch

from lora_hub.adapter.adapter import Adapter, Replaced
from lora_hub.errors import ComposeError

Part = tuple[Adapter, float]


def replaced_of(parts: Sequence[Part]) -> Mapping[str, Replaced]:
    """Return name → what replaces it, for all parts together.

    Raises:
        ComposeError: the sum depends on the base's tensor; or one part replaces a weight
            that another one scales.
    """
    names = sorted({name for adapter, _ in parts for name in adapter.replaced})
    return {name: _taken(name, parts) for name in names}


def _taken(name: str, parts: Sequence[Part]) -> Replaced:
    held = [
        (adapter.replaced[name], weight)
        for adapter, weight in parts
        if name in adapter.replaced
    ]
    first = held[0][0]
    total = math.fsum(weight for _, weight in held)
    if total != 1 or not all(is_same(first, other) for other, _ in held[1:]):
        told = f"of weight {held[0][1]:g}" if len(held) == 1 else "of several adapters"
        raise ComposeError(
            f"the sum of a replaced tensor {told} and the base's own depends on the base",
            where=name,
            hint="attach the adapters together, or merge them into the base together",
        )
    for adapter, _ in parts:
        if _scales(adapter, name) and name not in adapter.replaced:
            raise ComposeError(
                f"one adapter replaces the {name.rpartition('.')[2]}, another one scales "
                f"the {name.rpartition('.')[2]} it had",
                where=name,
                hint="attach the adapters together, or merge them into the base together",
            )
    return first


def _scales(adapter: Adapter, name: str) -> bool:
    """Return whether an update of the adapter scales the tensor of this name."""
    target, _, last = name.rpartition(".")
    update = adapter.updates.get(target)
    if update is None:
        return False
    if last == "bias":
        return update.bias_scale is not None
    held = update.p, update.q, update.magnitude
    return last == "weight" and any(each is not None for each in held)


def is_same(one: Replaced, other: Replaced) -> bool:
    """Return whether they are the same rows with the same bits."""
    return (
        one.rows == other.rows
        and one.tensor.dtype == other.tensor.dtype
        and one.tensor.shape == other.tensor.shape
        and torch.equal(one.tensor, other.tensor)
    )
