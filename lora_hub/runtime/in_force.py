"""What is in force: what `use`, `using` and `rows` asked for, everywhere or in a block."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real

from lora_hub.errors import InputError
from lora_hub.runtime.bank import Lease
from lora_hub.runtime.blocks import Block, Blocks
from lora_hub.runtime.route import BARE, Route

Weights = Mapping[str, float]
What = str | Weights | None


@dataclass(slots=True, eq=False)
class Used:
    """What was asked for, the route that makes it so, and the lease of what it needs.

    Attributes:
        sets: names with weights: one for all rows, or one for each row or `each` rows.
        each: None where the one set is for all rows.
        is_over: whether nobody asks for it any more.
    """

    sets: tuple[dict[str, float], ...] = ()
    each: int | None = None
    route: Route = BARE
    lease: Lease | None = None
    is_over: bool = False

    @property
    def names(self) -> set[str]:
        return {name for one in self.sets for name in one}

    @property
    def weights(self) -> dict[str, float]:
        """Name → weight; NaN where rows differ in it."""
        found: dict[str, float] = {}
        for one in self.sets:
            for name, weight in one.items():
                known = found.setdefault(name, weight)
                found[name] = weight if known == weight else math.nan
        return found

    def release(self) -> None:
        """Let what it needed leave, once what still runs has ended."""
        lease, self.lease = self.lease, None
        if lease is not None:
            lease.release()

    def exchange(self, other: "Used") -> None:
        """Take over another's route and lease; it may end meanwhile in its own thread."""
        self.release()
        self.route, self.lease = other.route, other.lease
        if self.is_over:
            other.release()

    def end(self) -> None:
        """Let go, for good. Takes no lock, so that it may happen anywhere.

        The route stays: who asked what acts a moment ago is about to read it.
        """
        self.is_over = True
        self.release()


@dataclass(slots=True)
class InForce:
    """What acts: `all` wherever no block is open."""

    all: Used = field(default_factory=Used)
    blocks: Blocks[Used] = field(default_factory=Blocks)

    @property
    def now(self) -> Used:
        """What acts for the code that asks: its innermost block, else what acts in all.

        Raises:
            InputError: see `Blocks.now`.
        """
        return self.blocks.now or self.all

    @property
    def is_any_open(self) -> bool:
        """Whether a block is open in any thread."""
        return bool(self.blocks.open)

    @property
    def everything(self) -> tuple[Used, ...]:
        open_ = (block.what for block in tuple(self.blocks.open))
        return (self.all, *(each for each in open_ if each is not None))

    def end(self, block: Block[Used]) -> None:
        """Close a block and let go what it needed."""
        used = block.what
        self.blocks.end(block)
        if used is not None:
            used.end()


def weights_of(what: What) -> dict[str, float]:
    """Return name → weight of what `use` takes.

    Raises:
        InputError: a weight is no finite number.
    """
    if what is None:
        return {}
    weights = {what: 1.0} if isinstance(what, str) else dict(what)
    for name, weight in weights.items():
        is_number = isinstance(weight, Real) and not isinstance(weight, bool)
        if not is_number or not math.isfinite(weight):
            raise InputError(
                f"the weight is {weight!r}, expected a finite number", where=name
            )
    return {name: float(weight) for name, weight in weights.items()}
