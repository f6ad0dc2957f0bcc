"""`Table`: what the kernels read of adapters at run time.

    slot × site → address of a, address of bt, rank, is it float32

A swap writes one slot's line (`in_place.py` says how, and when the table may grow). Nothing
here locks, and a table belongs to one stream: writes and replays on several streams are
the caller's to order. A table keeps the factors of a slot alive until others take their
place, unless the caller does; the memory is then the allocator's again, which hands it out
in the order of the stream. Room that was outgrown stays as long as the table, since another
thread may be about to launch with it; all of it is less than the room there is.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from lora_hub.errors import InputError
from lora_hub.kernels.in_place import refuse_if, refuse_while_capturing, write, zeros

# Triton reads 16 bytes at once, and is told that it may.
ALIGNED_BYTES = 16

# The kernels index within one factor with 32 bits.
MOST_ELEMENTS = 2**31


class Table:
    """The factors of every slot at every site.

    Args:
        device: where the layers are.
        dtype: the layers' dtype. Factors are of this dtype or of float32.
        sites: numbers of sites that fit, 0 … sites - 1; likewise `slots`.
        max_rank: the largest rank. It sizes what lies between the launches, nothing else.
    """

    def __init__(
        self,
        device: torch.device | str,
        dtype: torch.dtype,
        *,
        sites: int = 256,
        slots: int = 64,
        max_rank: int = 64,
    ) -> None:
        self.device = torch.device(device)
        self.dtype = dtype
        self.max_rank = max_rank
        self.captured = False
        self.cells = zeros((slots, sites, 4), torch.int64, self.device)
        self._held: dict[int, Mapping[int, tuple[Tensor, Tensor]]] = {}
        self._outgrown: list[Tensor] = []
        self._inp: dict[int, int] = {}
        self._out: dict[int, int] = {}

    @property
    def slots(self) -> int:
        return self.cells.shape[0]

    @property
    def sites(self) -> int:
        return self.cells.shape[1]

    def put(
        self,
        slot: int,
        factors: Mapping[int, tuple[Tensor, Tensor]],
        *,
        keep: bool = True,
    ) -> None:
        """Let the slot stand for these factors, in place of whatever it stood for.

        One copy of 32 bytes a site; launches queued before it see the old factors, those
        after it the new. Everything is checked first: where it fails, nothing has changed.

        Args:
            slot: its number, 0 or more.
            factors: site → a (rank, in), bt (rank, out), of true rank, scaling included.
            keep: whether to keep them alive; else the caller does, as long as rows name
                the slot.

        Raises:
            InputError: factors are not as the kernels read them, or a captured graph reads
                the table and they do not fit into it.
        """
        refuse_while_capturing(self.device)
        if slot < 0 or min(factors, default=0) < 0:
            raise InputError(f"slot {slot} or a site of {sorted(factors)} is negative")
        for site, (a, bt) in factors.items():
            self._check(site, a, bt)
        ranks = [a.shape[0] for a, _ in factors.values()]
        self.reserve(
            slots=slot + 1,
            sites=max(factors, default=-1) + 1,
            max_rank=max(ranks, default=0),
        )
        line = [[0, 0, 0, 0]] * self.sites
        for site, (a, bt) in factors.items():
            wide = int(a.dtype == torch.float32)
            line[site] = [a.data_ptr(), bt.data_ptr(), a.shape[0], wide]
        write(self.cells[slot], torch.tensor(line, dtype=torch.int64))
        for site, (a, bt) in factors.items():
            self._inp[site], self._out[site] = a.shape[1], bt.shape[1]
        self._held[slot] = dict(factors) if keep else {}

    def clear(self, slot: int) -> None:
        """Let the slot stand for nothing: rows that list it are bare."""
        if slot in self._held:
            self.put(slot, {})
            del self._held[slot]

    def takes(self, site: int, inp: int) -> None:
        """Say how many features a site takes; `gives` says how many it gives.

        The kernels cannot see where a tensor ends, so what is told once stays.

        Raises:
            InputError: the site takes another number.
        """
        known = self._inp.setdefault(site, inp)
        if known != inp:
            raise InputError(f"x has {inp} features, not {known}", where=f"site {site}")

    def gives(self, site: int, out: int) -> None:
        """Say how many features a site gives, as in `takes`."""
        known = self._out.setdefault(site, out)
        if known != out:
            raise InputError(f"y has {out} features, not {known}", where=f"site {site}")

    def reserve(self, *, slots: int = 0, sites: int = 0, max_rank: int = 0) -> None:
        """Make room for so many, if there is less.

        Raises:
            InputError: there is less, and a captured graph reads the table.
        """
        wanted = max(slots, self.slots), max(sites, self.sites)
        max_rank = max(max_rank, self.max_rank)
        grows = wanted != (self.slots, self.sites)
        if grows or max_rank > self.max_rank:
            refuse_if(
                self.captured,
                f"room for {self.slots} slots, {self.sites} sites and rank {self.max_rank},"
                f" where {wanted[0]}, {wanted[1]} and {max_rank} are needed",
                "Table.reserve",
            )
        self.max_rank = max_rank
        if grows:
            # At least twice as many, so that one by one costs no copy each.
            slots, sites = (
                max(new, 2 * old) if new > old else old
                for new, old in zip(wanted, self.cells.shape, strict=False)
            )
            cells = zeros((slots, sites, 4), torch.int64, self.device)
            cells[: self.slots, : self.sites] = self.cells
            if cells.is_cuda:  # whichever stream reads it first
                torch.cuda.current_stream(cells.device).synchronize()
            self._outgrown.append(self.cells)
            self.cells = cells

    def _check(self, site: int, a: Tensor, bt: Tensor) -> None:
        where = f"site {site}"
        if a.ndim != 2 or bt.ndim != 2 or a.shape[0] != bt.shape[0]:
            raise InputError(
                f"factors have shapes {tuple(a.shape)} and {tuple(bt.shape)},"
                " expected (rank, in) and (rank, out)",
                where=where,
            )
        for name, factor in (("a", a), ("bt", bt)):
            if factor.dtype not in {self.dtype, torch.float32} or factor.dtype != a.dtype:
                raise InputError(
                    f"{name} is {factor.dtype}, the kernels read {self.dtype} or float32",
                    where=where,
                )
            if factor.device != self.cells.device:
                raise InputError(
                    f"{name} is on {factor.device}, the layers are on {self.cells.device}",
                    where=where,
                )
            if not factor.is_contiguous() or factor.data_ptr() % ALIGNED_BYTES:
                raise InputError(
                    f"{name} does not lie in one piece, at a multiple of 16 bytes",
                    where=where,
                )
            if factor.numel() >= MOST_ELEMENTS:
                raise InputError(f"{name} has {factor.numel()} elements", where=where)
        known = self._inp.get(site, a.shape[1]), self._out.get(site, bt.shape[1])
        if known != (a.shape[1], bt.shape[1]):
            raise InputError(
                f"factors take {a.shape[1]} and give {bt.shape[1]} features,"
                f" the layer {known[0]} and {known[1]}",
                where=where,
            )
