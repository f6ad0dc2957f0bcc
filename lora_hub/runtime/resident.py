"""`Resident`, an adapter beside the model's weights: what it does at each place there.

Everything is ready to be used: DoRA resolved, scalings folded in, dtypes those that are
computed in. Whoever runs a forward reads a resident and never changes it, so that one may
be evicted or swapped while a forward that began with it goes on.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora_hub.adapter.adapter import Replaced
from lora_hub.manifest.document import Layer

Key = tuple[nn.Module, str]  # a tensor's module and its name there


@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """One update, ready: `Δ = diag(p)·W + W·diag(q) + btᵀ·a`, and what is added to outputs.

    All tensors are of the dtype that is computed in, beside the layer, views of one slab.
    See `adapter.update.Update` for what each means; `a` of a convolution is flat.

    Attributes:
        a: (rank, in_features), experts in front where there are.
        bt: (rank, out_features), b transposed times the scaling; experts in front.
        largest: the largest absolute number of `bt`, p, q and biases, so that a weight
            is judged without reading them.
    """

    a: Float[Tensor, "*experts rank inp"]
    bt: Float[Tensor, "*experts rank out"]
    layer: Layer = "linear"
    p: Float[Tensor, " out"] | None = None
    q: Float[Tensor, " inp"] | None = None
    bias: Float[Tensor, " out"] | None = None
    bias_scale: Float[Tensor, " out"] | None = None
    kernel: tuple[int, ...] = ()
    largest: float = 0.0

    @property
    def rank(self) -> int:
        return self.a.shape[-2]


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Resident:
    """One adapter on the device.

    Attributes:
        name: what to call it in messages.
        key: its identity: the package digest, or one of its own for an adapter in memory.
        at: index of a site (`sites.py`) → what is added to that layer's output.
        experts: the parameter that holds experts → what each expert's weight gains.
        replaced: a tensor → what takes its place; with which scaling of p, q by its own
            adapter is told by `at`.
        tokens: of an aLoRA, the invocation sequence; else empty.
        nbytes: of everything above.
        devices: on which its slabs are.
        most: dtype that is computed in → the largest `Factors.largest` of it, at least 1;
            found in `at` and `experts` by default.
        heaviest: the largest weight with which every number stays one that the dtype can
            hold which is computed in.
        shrinks: index of a site → the product it shares with its siblings (`shrink.py`),
            kept from the first forward on.
    """

    name: str
    key: str
    at: Mapping[int, Factors]
    experts: Mapping[Key, Factors] = field(default_factory=dict)
    replaced: Mapping[Key, Replaced] = field(default_factory=dict)
    tokens: tuple[int, ...] = ()
    nbytes: int = 0
    devices: frozenset[torch.device] = frozenset()
    most: Mapping[torch.dtype, float] | None = None
    heaviest: float = field(init=False)
    shrinks: dict[int, Any] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        most = _most(self) if self.most is None else self.most
        limits = [torch.finfo(dtype).max / each for dtype, each in most.items()]
        object.__setattr__(self, "heaviest", min(limits, default=float("inf")))

    @property
    def adds_only(self) -> bool:
        """Whether all it does is to add to outputs of layers, token by token."""
        return not (self.experts or self.replaced or self.tokens)


def _most(resident: Resident) -> dict[torch.dtype, float]:
    all_of_them = (*resident.at.values(), *resident.experts.values())
    most = {each.bt.dtype: 1.0 for each in all_of_them}
    for each in all_of_them:
        most[each.bt.dtype] = max(most[each.bt.dtype], each.largest)
    return most
