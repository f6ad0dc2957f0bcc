"""What acted in a forward that a backward computes once more (gradient checkpointing).

A checkpointed layer runs again while gradients are computed, perhaps in another thread and
after other adapters were put to use; it must do what it did. The first thing a backward
passes is the end of the forward, the node of its graph that made the model's output. Each
such node gets a hook that says: this backward is that forward's. It lives and dies with the
graph, so nothing is kept of forwards whose gradients nobody can ask any more.

Limit: where the whole model is checkpointed with `use_reentrant=True`, its output has no
graph; what acted last is taken then, and it is refused if something else acts meanwhile.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from lora_hub.errors import InputError
from lora_hub.runtime.route import Route

_DEEPEST = 3  # of tuples and mappings in an output: hidden states of each layer, a cache


@dataclass(slots=True, eq=False, weakref_slot=True)
class _Forward:
    route: Route
    task: int = -1  # the backward that passed its end


class Recomputing:
    """The forwards of one model whose gradients may still be asked."""

    def __init__(self) -> None:
        self._forwards: WeakSet[_Forward] = WeakSet()
        self._last: Route | None = None
        self._lock = threading.Lock()

    def seen(self, route: Route, output: Any) -> None:
        """Note what acted in a forward that gave this output."""
        self._last = route
        forward = _Forward(route)
        nodes = {
            each.grad_fn for each in _tensors(output, _DEEPEST) if each.grad_fn is not None
        }
        for node in nodes:
            node.register_prehook(_mark(forward))
        if nodes:
            with self._lock:
                self._forwards.add(forward)

    def route(self, now: Callable[[], Route]) -> Route:
        """Return what acted in the forward that the running backward computes once more.

        Raises:
            InputError: it goes through several forwards in which other adapters acted, or
                through one that is not known and after which others were put to use.
        """
        task = torch._C._current_graph_task_id()  # noqa: SLF001  (has no public name)
        with self._lock:
            known = list(self._forwards)
        # A checkpoint inside a checkpoint runs in a backward of its own.
        passed = [each for each in known if each.task == task] or [
            each for each in known if each.task != -1
        ]
        routes = [each.route for each in passed]
        if not routes:
            current = now()
            if self._last is None or self._last.is_same(current):
                return current
            routes = [self._last, current]
        first = routes[0]
        if all(first.is_same(each) for each in routes):
            return first
        raise InputError(
            "one backward computes layers once more of forwards in which different "
            "adapters acted, so which of them act there is not known",
            hint="call backward() for each forward before other adapters are used",
        )


def _mark(forward: _Forward) -> Callable[[object], None]:
    def mark(_gradients: object) -> None:
        forward.task = torch._C._current_graph_task_id()  # noqa: SLF001

    return mark


def _tensors(output: Any, depth: int) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif depth and isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value, depth - 1)
    elif depth and isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value, depth - 1)
