"""What is in force: what `use`, `using` and `rows` asked for, everywhere or in a thread."""

import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real

from lora_hub.errors import InputError
from lora_hub.runtime.bank import Lease
from lora_hub.runtime.route import BARE, Route

Weights = Mapping[str, float]
What = str | Weights | None


@dataclass(slots=True, eq=False)
class Used:
    """What was asked for, the route that makes it so, and the lease of what it needs.

    Attributes:
        sets: names with weights: one for all rows, or one for each row or `each` rows.
        each: None where the one set is for all rows.
    """

    sets: tuple[dict[str, float], ...] = ()
    each: int | None = None
    route: Route = BARE
    lease: Lease | None = None

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


class _Blocks(threading.local):
    def __init__(self) -> None:
        self.open: list[Used] = []


@dataclass(slots=True)
class InForce:
    """What acts: `all` in every thread that has no block open.

    Attributes:
        open: the blocks of all threads.
    """

    all: Used = field(default_factory=Used)
    open: list[Used] = field(default_factory=list)
    _blocks: _Blocks = field(default_factory=_Blocks)

    @property
    def now(self) -> Used:
        """What acts in this thread: its innermost block, else what acts in all."""
        blocks = self._blocks.open
        return blocks[-1] if blocks else self.all

    @property
    def is_in_block(self) -> bool:
        return bool(self._blocks.open)

    @property
    def everything(self) -> tuple[Used, ...]:
        return (self.all, *self.open)

    def begin(self, used: Used) -> None:
        """Open a block in this thread."""
        self.open.append(used)
        self._blocks.open.append(used)

    def end(self, used: Used) -> None:
        """Close a block of this thread."""
        self._blocks.open.remove(used)
        self.open.remove(used)


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
