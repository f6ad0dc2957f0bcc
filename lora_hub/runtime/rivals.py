"""Other hosts on the same layers: two that act at once would add twice, and nobody says so.

A notebook's cell that attaches is easily run again, while the host of before still acts.
"""

import threading
from typing import Protocol, runtime_checkable
from weakref import WeakSet

from torch import nn

from lora_hub.errors import InputError


@runtime_checkable
class Acting(Protocol):
    """A host."""

    @property
    def acts(self) -> bool:
        """Whether it changes anything of the model, for any thread."""
        ...


class Rivals:
    """The hosts that share layers with one host, known from its beginning on.

    Args:
        host: it stays one until `leave`, or until nobody has it any more.
    """

    def __init__(self, host: Acting, model: nn.Module) -> None:
        self.modules: WeakSet[nn.Module] = WeakSet(model.modules())
        self.host: WeakSet[Acting] = WeakSet([host])
        self.others: WeakSet[Rivals] = WeakSet()
        with _LOCK:
            for other in _ALL:
                if not self.modules.isdisjoint(other.modules):
                    self.others.add(other)
                    other.others.add(self)
            _ALL.add(self)

    def check(self) -> None:
        """Refuse where another host acts.

        Raises:
            InputError: it does.
        """
        for other in tuple(self.others):
            if any(host.acts for host in tuple(other.host)):
                raise InputError(
                    "adapters of another host act on layers of this model, and the two do "
                    "not know of each other",
                    hint="detach() that host first, or use(None) there; a model needs one "
                    "host alone",
                )

    def leave(self) -> None:
        """Be no host's any more."""
        self.host.clear()
        self.modules.clear()
        with _LOCK:
            _ALL.discard(self)


_ALL: WeakSet[Rivals] = WeakSet()
_LOCK = threading.Lock()
