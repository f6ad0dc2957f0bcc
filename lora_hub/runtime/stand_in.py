"""A forward of ours on one module, which runs a twin of it for each set of adapters.

It asks what acts on the thread that calls it. All rows that use the same adapters here go
through once, and what comes back is put together in the rows' order (`apart.py`).
"""

import functools
import sys
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lora_hub.runtime.apart import Apart
from lora_hub.runtime.new_tensors import NewTensors, Recipe
from lora_hub.runtime.route import Route, Rows, Set
from lora_hub.runtime.step import Step
from lora_hub.runtime.twin import Forward, forward_of, run, slot_of


class StandIn:
    """What stands in the place of a module's forward; made first, put on afterwards.

    Args:
        module: it is left as it is until `put_on`.
        current: gives the step that runs on the thread that asks.
        where: what to call the module in messages.
        is_read_along: whether torch may read its tensors without calling it, unless it
            has a hook.

    Attributes:
        tensors: the new tensors of the module.
        is_on: whether it does anything; asleep, it goes on to the module's own forward.

    Raises:
        FitError: the module's forward cannot be run with other tensors.
    """

    def __init__(
        self,
        module: nn.Module,
        current: Callable[[], Step],
        where: str,
        *,
        is_read_along: bool = False,
    ) -> None:
        self.tensors = NewTensors(module)
        self.is_on = False
        self._home = module
        self._where = where
        self._current = current
        self._forward: Forward = forward_of(module, where=where)
        self._is_read_along = is_read_along
        self._hook: RemovableHandle | None = None
        self._put: Any = None  # what stands in the module's dictionary
        self._given: Any = None  # what stood there before, None where nothing did

    def is_in_place(self) -> bool:
        """Whether a call of the module comes here, as far as can be seen."""
        return self._put is not None and any(
            _leads_to(self._home.__dict__.get(slot), self._put)
            for slot in ("forward", "_old_forward")
        )

    def put_on(self) -> None:
        """Stand in the place of the module's forward."""
        self.is_on = True
        if self._is_read_along and self._hook is None:
            self._hook = self._home.register_forward_hook(_nothing)
        if self._put is None:
            slot = slot_of(self._home)
            self._given = self._home.__dict__.get(slot)
            # A bound method, so that a deep copy of the model runs on the copy.
            self._put = MethodType(_uncompiled(self._called()), self._home)
            self._home.__dict__[slot] = self._put

    def take_off(self) -> bool:
        """Give the place back; return whether it could be, else ours sleeps inside."""
        self.is_on = False
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        held = self._home.__dict__
        for slot in ("forward", "_old_forward"):
            if held.get(slot) is self._put:
                if self._given is not None:
                    held[slot] = self._given
                elif slot == "forward":
                    del held[slot]
                else:  # accelerate was put on after us and wants one to go on to
                    held[slot] = MethodType(type(self._home).forward, self._home)
                self._put = None
                return True
        return not self.is_in_place()

    def _called(self) -> Callable[..., Any]:
        def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if not self.is_on:
                return self._forward(module, *args, **kwargs)
            return self._run(module, self._current(), args, kwargs)

        return forward

    def _run(
        self, module: nn.Module, step: Step, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        route = step.route
        if not route.segments:  # the bare route is everybody's: nothing is kept there
            return self._forward(module, *args, **kwargs)
        groups = route.groups.get(self)
        if groups is None:
            groups = route.groups[self] = self._groups(route)
        if len(groups) == 1:
            return self._with(module, groups[0][0], args, kwargs)
        assert route.total is not None
        call = Apart(module, args, kwargs, route.total, step.shape, self._where)
        indices = [call.index(rows) for _, rows in groups]
        outputs = []
        for (recipe, _), index in zip(groups, indices, strict=True):
            some, named = call.taken(index)
            outputs.append(self._with(module, recipe, some, named))
        return call.together(outputs, indices)

    def _groups(self, route: Route) -> list[tuple[Recipe | None, Rows]]:
        """Return what acts on this module and on which rows, sets that are one joined."""
        found: dict[Set, list[int]] = {}
        for segment in route.segments:
            acting = self.tensors.here(segment.set)
            found.setdefault(acting, []).extend(segment.rows or ())
        recipes = [self.tensors.recipe(acting) if acting else None for acting in found]
        rows = [Rows(sorted(each), route.total or 0) for each in found.values()]
        return list(zip(recipes, rows, strict=True))

    def _with(
        self,
        module: nn.Module,
        recipe: Recipe | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if recipe is None:
            return self._forward(module, *args, **kwargs)
        return run(self._forward, module, self.tensors.of(module, recipe), args, kwargs)


def _nothing(*_given: object) -> None:
    """Stand where a hook is looked for."""


def _leads_to(callable_: Any, ours: Any, depth: int = 8) -> bool:
    """Return whether a forward is ours or goes on to it, as far as can be seen."""
    if callable_ is ours:
        return True
    if callable_ is None or not depth:
        return False
    held = getattr(callable_, "__closure__", None) or ()
    inner = [
        getattr(callable_, "__wrapped__", None),
        getattr(callable_, "__func__", None),
        getattr(callable_, "func", None),
        *getattr(callable_, "args", ()),
        *(cell.cell_contents for cell in held if _is_filled(cell)),
    ]
    return any(_leads_to(each, ours, depth - 1) for each in inner if callable(each))


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _uncompiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return the forward so that torch.compile leaves it as it is.

    It sees neither threads nor what is kept. `torch.compiler.disable` takes a second and
    80 MB to import, so it waits until somebody compiles.
    """
    disabled: list[Callable[..., Any]] = []

    @functools.wraps(forward)
    def called(*args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return forward(*args, **kwargs)
        if not disabled:
            disable = torch.compiler.disable
            disabled.append(disable(forward))  # type: ignore[no-untyped-call]
        return disabled[0](*args, **kwargs)

    return called
