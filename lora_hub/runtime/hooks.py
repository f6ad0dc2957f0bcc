"""The hooks of a host: one on each layer that an adapter adds to, two on the model.

Those on layers are put on when an adapter first needs them and stay, whichever adapters
act afterwards, so that a change of adapters registers nothing and compiled code stays
right. What acts is asked in each forward: the model's hooks settle it for all its layers
(`step.py`), and a layer that is called by itself asks the host.
"""

import sys
import threading
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any
from weakref import WeakSet, WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules
from torch.utils.hooks import RemovableHandle

from lora_hub.errors import InputError
from lora_hub.runtime import compiled
from lora_hub.runtime.added import is_conv1d
from lora_hub.runtime.effect import Effect
from lora_hub.runtime.invocation import Invocations, sequences_of
from lora_hub.runtime.product import Products
from lora_hub.runtime.recomputing import Recomputing
from lora_hub.runtime.route import BARE, Route
from lora_hub.runtime.sites import Sites
from lora_hub.runtime.step import Step, Steps
from lora_hub.runtime.uncompiled import uncompiled, uncompiled_alone

_CALL = nn.Module._call_impl.__code__  # noqa: SLF001  (has no public name)

_NOTHING = Effect(BARE, 0, Sites())

# The hooks that torch calls on every module, which may keep an output.
_ON_ALL: Mapping[int, object] = torch_modules._global_forward_hooks  # noqa: SLF001


class Hooks:
    """All hooks of a host on its model.

    Args:
        now: what acts for the code that asks, outside of any forward.

    Attributes:
        changing: held while hooks and twins are put on or taken off, which the end of a
            forward may do in its own thread.
        is_traced: whether torch.compile has seen them.
        is_more_than_added: whether adapters are in force that do more than add to outputs.
        products: what the kernels of a GPU may compute.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sites,
        now: Callable[[], Route],
        products: Products | None = None,
    ) -> None:
        self._model = model
        self.sites = sites
        self.products = products
        self._now = now
        self.changing = threading.RLock()
        self._writing = threading.Lock()
        self._steps = Steps()
        self._invocations = Invocations()
        self._recomputing = Recomputing()
        # Of all threads. Weak, so that those of a thread that is gone do not stay.
        self._running: WeakSet[Step] = WeakSet()
        self._when_idle: Callable[[], None] | None = None
        # Site → what acted there when compiled code ran last.
        self._traced: WeakValueDictionary[int, Route] = WeakValueDictionary()
        self._number = compiled.number_of(self)
        self.is_traced = False
        self.is_more_than_added = False
        self._is_whole = True  # whether what is told to be on is on
        self._on: dict[int, RemovableHandle] = {}
        self._on_model: list[RemovableHandle] = []

    def __reduce__(self) -> str:
        raise InputError(
            "a model on which adapters act, or did in a block, cannot be pickled",
            hint="host.use(None) first; save_pretrained and state_dict give the base alone",
        )

    def __deepcopy__(self, _memo: object) -> "Hooks":
        """A copy of the model asks the same host."""
        return self

    @property
    def route(self) -> Route:
        """What acts in this thread: that of the forward it is in, else the host's."""
        opened = self._steps.open
        if opened:
            return opened[-1].route
        return BARE if self._began_without() else self._asked()

    def _asked(self) -> Route:
        return self._recomputing.route(self._now) if _in_backward() else self._now()

    def _began_without(self) -> bool:
        """Whether this thread is in a forward that began before there were hooks.

        Nothing acted then, and so it stays until its end.
        """
        frame: FrameType | None = sys._getframe(1)  # noqa: SLF001  (has no public name)
        while frame is not None:
            if frame.f_code is _CALL and frame.f_locals.get("self") is self._model:
                return True
            frame = frame.f_back
        return False

    def step(self) -> Step:
        """Return the call of the model that this thread is in, or one of no shape."""
        return self._steps.now or Step(self.route)

    @property
    def step_or_none(self) -> Step | None:
        """The call of the model that this thread is in."""
        return self._steps.now

    def put_on(self, numbers: Iterable[int]) -> bool:
        """Put hooks on the model and on these sites; return whether one is new."""
        if not self._is_whole:  # an interrupt broke off the taking off
            self.take_off()
        new = [number for number in numbers if number not in self._on]
        if len(self._on_model) < 2:  # none, or one if an interrupt came in between
            self._take_off_model()
            self._on_model.append(
                self._model.register_forward_hook(
                    self._after, with_kwargs=True, always_call=True
                )
            )
            self._on_model.append(
                self._model.register_forward_pre_hook(
                    self._before, with_kwargs=True, prepend=True
                )
            )
        for number in new:
            layer = self.sites[number]
            self._on[number] = layer.register_forward_hook(
                self._layer_hook(number, layer), with_kwargs=True
            )
        return bool(new)

    @property
    def is_running(self) -> bool:
        """Whether a forward of the model runs, in any thread."""
        return bool(self._running)

    @contextmanager
    def nothing_runs(self) -> Iterator[None]:
        """Refuse forwards inside of the block, in which weights are written.

        Raises:
            InputError: one runs.
        """
        self.forget_broken_off()
        with self.changing:
            self._when_idle = None
            self.put_on(())
        with self._writing:
            if self._running:
                raise InputError(
                    "the model runs",
                    hint="merge and unmerge between two calls of the model",
                )
            yield

    def when_idle(self, act: Callable[[], None] | None) -> None:
        """Call this as soon as no forward of the model runs, which may be now."""
        with self.changing:
            self._when_idle = act
        self._look_whether_idle()

    def _look_whether_idle(self) -> None:
        act = self._when_idle
        if act is not None and not self._running:
            with self.changing:
                if self._when_idle is act and not self._running:
                    self._when_idle = None
                    act()

    def take_off(self) -> None:
        """Remove every hook."""
        self._is_whole = False
        for handle in self._on.values():
            handle.remove()
        self._on.clear()
        self._take_off_model()
        self._is_whole = True

    def _take_off_model(self) -> None:
        for handle in self._on_model:
            handle.remove()
        self._on_model.clear()

    def __len__(self) -> int:
        return len(self._on)

    def forget_broken_off(self) -> None:
        """Let go of steps that an interrupt left open, where no forward runs above us."""
        for step in self._steps.forget_broken_off():
            self._running.discard(step)

    @typing.no_type_check  # torch.compile may read it
    def _before(
        self, _model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        """Settle what acts until the model returns; called by torch before its forward."""
        if torch.compiler.is_compiling():
            if self.is_more_than_added:
                self._begin_eagerly(args, kwargs, None)
            return
        # What calls the hook runs until the model's forward ends.
        self._begin_eagerly(args, kwargs, sys._getframe(1))  # noqa: SLF001

    def _begin(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], frame: FrameType | None
    ) -> None:
        self.forget_broken_off()
        opened = self._steps.open
        outer = opened[-1] if opened else None
        step = Step(BARE, _shape(args, kwargs), frame=frame)
        opened.append(step)  # first: what is called afterwards ends it
        self._running.add(step)
        if self._writing.locked():
            raise InputError(
                "another thread merges adapters into the model's weights, or restores them",
                hint="merge and unmerge between two calls of the model",
            )
        route = step.route = self._asked() if outer is None else outer.route
        if route.total is not None and step.shape and step.shape[0] != route.total:
            raise InputError(
                f"the model was given {step.shape[0]} rows, and {route.total} have "
                "adapters of their own",
                hint="give one entry a row; each=... where one entry stands for several "
                "rows, as with beams or num_return_sequences",
            )
        if not route.adds_only:
            residents = (each.resident for each in route.entries)
            sequences = sequences_of((each.name, each.tokens) for each in residents)
            step.awake = self._invocations.seen(sequences, args, kwargs)

    @typing.no_type_check  # torch.compile may read it
    def _after(
        self, _model: nn.Module, _args: object, _kwargs: object, output: Any
    ) -> None:
        """End the step; called by torch after the model's forward, also a failed one."""
        if torch.compiler.is_compiling():
            if self.is_more_than_added:
                self._end_eagerly(output)
            return
        self._end_eagerly(output)

    def _end(self, output: Any) -> None:
        step = self._steps.end()
        if step is None:
            return
        self._running.discard(step)
        if output is not None and step.awake:
            self._invocations.keep(step.awake, output)
        if output is not None and torch.is_grad_enabled():
            self._recomputing.seen(step.route, output)
        self._look_whether_idle()

    _begin_eagerly = uncompiled(_begin)
    _end_eagerly = uncompiled(_end)
    uncompiled_alone(_before)
    uncompiled_alone(_after)

    def _layer_hook(self, number: int, layer: nn.Module) -> Callable[..., Tensor | None]:
        """Return what torch calls after the layer's forward."""
        # A function with all it needs at hand: it is called for each layer and token.
        steps, hooks, own_number = self._steps, self, self._number
        is_compiling = torch.compiler.is_compiling
        # Torch's own forwards give memory of their own, which no hook before us has seen.
        kind = type(layer)
        gives_fresh = kind.forward is nn.Linear.forward or is_conv1d(layer)
        home, held = layer, layer.__dict__
        others = layer._forward_hooks  # noqa: SLF001  (torch's own name)

        @typing.no_type_check  # torch.compile reads its first lines
        def add(
            layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], y: Tensor
        ) -> Tensor | None:
            if is_compiling():
                return _traced_hook(hooks, own_number, number, layer, args, kwargs, y)
            opened = steps.open
            if opened:
                step = opened[-1]
                route = step.route
            else:
                step, route = None, hooks.route
            effect = route.effects.get(number)
            if effect is None:
                effect = hooks.effect_of(route, number)
            if effect.is_nothing:
                return None
            x: Tensor = args[0] if args else next(iter(kwargs.values()))
            is_fresh = (
                gives_fresh
                and layer is home  # and no copy of it
                and type(y) is Tensor
                and len(others) == 1
                and not _ON_ALL
                and "forward" not in held
                and y.is_contiguous()
            )
            return effect(step, layer, x, y, is_fresh=is_fresh)

        hook: Callable[..., Tensor | None] = add
        return hook

    def traced(self, site: int) -> Route:
        """Return what acts now on a layer of compiled code.

        Raises:
            InputError: a backward computes the layer once more, and others act than did.
        """
        route = self.route
        if not _in_backward():
            self._traced[site] = route
            return route
        before = self._traced.get(site)
        if before is None or not before.is_same(route):
            raise InputError(
                "other adapters act in the backward of compiled code than did in its "
                "forward",
                where=self.sites.path(site),
                hint="call backward() before other adapters are used",
            )
        return route

    def effect_of(self, route: Route, site: int) -> Effect:
        """Return what a route does on a layer."""
        found: Effect | None = route.effects.get(site)
        if found is None:
            found = Effect(route, site, self.sites, self.products)
            # The bare route is everybody's and must not hold what is a model's.
            found = route.effects[site] = _NOTHING if found.is_nothing else found
        return found


@typing.no_type_check  # torch.compile reads it
def _traced_hook(
    hooks: Hooks,
    number: int,
    site: int,
    layer: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    y: Tensor,
) -> Tensor:
    x = args[0] if args else next(iter(kwargs.values()))
    if hooks.is_more_than_added:
        return _eager_hook(hooks, site, layer, x, y)
    return torch.ops.lora_hub.add(x, y, number, site)[0]


@uncompiled
def _eager_hook(hooks: Hooks, site: int, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    step = hooks.step()
    effect = hooks.effect_of(step.route, site)
    if effect.is_nothing:
        return y
    found = effect(step, layer, x, y, is_fresh=False)
    return y if found is None else found


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1  # noqa: SLF001  (has no public name)


def _shape(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, ...]:
    """Return rows, or rows and tokens, of what the model is given; () where unknown."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.dim():
            # Numbers of tokens have two axes, what stands for tokens a third one.
            axes = 3 if value.is_floating_point() else 2
            return tuple(value.shape[: 2 if value.dim() == axes else 1])
    return ()
