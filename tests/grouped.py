"""Cases of the grouped product, and how far from float64 a result may be."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora_hub.kernels import reference
from lora_hub.kernels.rows import RowLists
from lora_hub.kernels.table import Table


@dataclass
class Case:
    """Rows of a batch with their adapters, and a table that holds them.

    `ranks` gives slot → rank and dtype; rank 0 is an adapter that leaves the site alone.
    """

    lists: list[list[tuple[int, float]]]
    ranks: dict[int, tuple[int, torch.dtype]]
    inp: int = 40
    out: int = 24
    tokens: int = 1  # of one row
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    seed: int = 0
    site: int = 3
    factors: dict[int, tuple[Tensor, Tensor]] = field(init=False)

    def __post_init__(self):
        random = torch.Generator().manual_seed(self.seed)

        def normal(*shape, dtype=self.dtype):
            return torch.randn(shape, generator=random).to(dtype).to(self.device)

        total = len(self.lists) * self.tokens
        self.x = normal(total, self.inp)
        self.y = normal(total, self.out)
        self.factors = {
            slot: (normal(rank, self.inp, dtype=dtype), normal(rank, self.out, dtype=dtype))
            for slot, (rank, dtype) in self.ranks.items()
            if rank
        }

    def table(self, **room):
        table = Table(
            self.device, self.dtype, **({"sites": 8, "slots": 4, "max_rank": 16} | room)
        )
        for slot, factors in self.factors.items():
            table.put(slot, {self.site: factors})
        return table

    def rows(self, **room):
        rows = RowLists(self.device, **({"rows": 4, "entries": 4, "per_row": 2} | room))
        rows.write(self.lists)
        return rows

    def truth(self, **given):
        return reference.add_grouped(
            given.get("y", self.y), given.get("x", self.x), self.lists, self.factors
        )

    def check(self, found, *, y=None, x=None):
        """Assert that it is the truth but for one rounding and the order of the sums."""
        y, x = self.y if y is None else y, self.x if x is None else x
        truth = self.truth(y=y, x=x)
        sizes = reference.add_grouped(
            y.abs(),
            x.abs(),
            [[(slot, abs(weight)) for slot, weight in pairs] for pairs in self.lists],
            {slot: (a.abs(), bt.abs()) for slot, (a, bt) in self.factors.items()},
        )
        limits = torch.finfo(found.dtype)
        # One rounding, and below the least normal number the distance there. Triton's
        # interpreter cuts bfloat16 off where a GPU rounds.
        cut = found.dtype == torch.bfloat16 and found.device.type == "cpu"
        rounding = truth.abs() * limits.eps * (1 if cut else 0.5)
        rounding += limits.smallest_normal * limits.eps
        # Each sum in float32 loses at most 2⁻²⁴ an addition; three TF32 products 2⁻²⁰.
        additions = self.inp + sum(rank for rank, _ in self.ranks.values()) + 8
        summing = sizes * (additions * 2.0**-24 + 2.0**-20)
        excess = (found.double() - truth).abs() - rounding - summing
        assert excess.max() <= 0, f"off by {excess.max()} more than allowed"
