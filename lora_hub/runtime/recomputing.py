"""What acted in a forward that a backward computes once more (gradient checkpointing).

A checkpointed layer runs again while gradients are computed, perhaps in another thread and
after other adapters were put to use; it must do what it did. The first thing a backward
passes is the end of the forward, the node of its graph that made the model's output. Each
such node gets a hook that says: this backward is that forward's. It lives and dies with the
graph, so nothing is kept of forwards whose gradients nobody can ask any more.

A backward that passes no such end, as of a hidden state that was taken out of the model, or
where the whole model is checkpointed with `use_reentrant=True` so that its output has no
graph, is known only if one and the same has acted in all forwards it could belong to; else
it is refused.

Limit: of a forward whose output is gone and after which another one had its backward, a
hidden state is not known to be still there.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.autograd import Variable

from lora_hub.errors import InputError
from lora_hub.runtime.route import Route

# What acts on which rows, without holding it.
_Told = tuple[object, ...]

_DEEPEST = 3  # of tuples and mappings in an output: hidden states of each layer, a cache


@dataclass(slots=True, eq=False, weakref_slot=True)
class _Forward:
    route: Route
    task: int = -1  # the backward that passed its end and still runs


class Recomputing:
    """The forwards of one model whose gradients may still be asked."""

    def __init__(self) -> None:
        self._forwards: WeakSet[_Forward] = WeakSet()
        self._last: _Told | None = None
        # Since a backward ended: what acted first, and whether something else did, too.
        self._first: _Told | None = None
        self._is_mixed = False
        self._lock = threading.Lock()

    def seen(self, route: Route, output: Any) -> None:
        """Note what acted in a forward that gave this output."""
        told = self._last = _told(route)
        if self._first is None:
            self._first = told
        elif self._first != told:
            self._is_mixed = True
        forward = _Forward(route)
        nodes = {
            each.grad_fn for each in _tensors(output, _DEEPEST) if each.grad_fn is not None
        }
        for node in nodes:
            node.register_prehook(self._mark(forward))
        if nodes:
            with self._lock:
                self._forwards.add(forward)

    def route(self, now: Callable[[], Route]) -> Route:
        """Return what acted in the forward that the running backward computes once more.

        Raises:
            InputError: it goes through several forwards in which other adapters acted, or
                through one that is not known, and others acted in another one or act now.
        """
        task = torch._C._current_graph_task_id()  # noqa: SLF001  (has no public name)
        with self._lock:
            known = list(self._forwards)
        # A checkpoint inside a checkpoint runs in a backward of its own.
        passed = [each for each in known if each.task == task] or [
            each for each in known if each.task != -1
        ]
        routes = [each.route for each in passed]
        is_mixed = False
        if not routes:
            routes = [now(), *(each.route for each in known)]
            is_mixed = self._is_mixed or self._last not in (None, _told(routes[0]))
            _at_the_end(self._ended)
        first = routes[0]
        if not is_mixed and all(first.is_same(each) for each in routes):
            return first
        raise InputError(
            "one backward computes layers once more of forwards in which different "
            "adapters acted, so which of them act there is not known",
            hint="call backward() for each forward before other adapters are used",
        )

    def _mark(self, forward: _Forward) -> Callable[[object], None]:
        def ended() -> None:
            forward.task = -1
            self._ended()

        def mark(_gradients: object) -> None:
            forward.task = torch._C._current_graph_task_id()  # noqa: SLF001
            _at_the_end(ended)

        return mark

    def _ended(self) -> None:
        self._first, self._is_mixed = None, False


def _at_the_end(call: Callable[[], None]) -> None:
    """Call this when the backward that runs has ended."""
    engine = Variable._execution_engine  # noqa: SLF001  (has no public name)
    engine.queue_callback(call)


def _told(route: Route) -> _Told:
    sets = (
        (tuple((resident.key, weight) for resident, weight in each.set), each.numbers)
        for each in route.segments
    )
    return (route.total, *sets)


def _tensors(output: Any, depth: int) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif depth and isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value, depth - 1)
    elif depth and isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value, depth - 1)
