"""A module's own forward with other parameters, while the module stays as it is.

A *twin* is an object of the module's type that shares all the module has but the tensors
it is given. The forward that runs on it reads those; the module, other threads and what
reads the model meanwhile see nothing, and nothing is to be put back.

What a forward sets on its twin is set on the module. Where another tool put a forward of
its own on the module, that one goes on to be called if it can be told which module to run
on, as accelerate's and every bound method can; else it is refused by name.
"""

import functools
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from lora_hub.errors import FitError

# The module or its twin, then what the module is called with → what it gives.
Forward = Callable[..., Any]

_OWN = ("_parameters", "_buffers")
_MISSING = object()


def slot_of(module: nn.Module) -> str:
    """Return where the forward stands that reads the module's tensors.

    accelerate keeps it beside its own, which brings offloaded tensors first.
    """
    held = module.__dict__
    return "_old_forward" if "_hf_hook" in held and "_old_forward" in held else "forward"


def forward_of(module: nn.Module, *, where: str) -> Forward:
    """Return the module's forward, to be called with a twin in the module's place.

    Raises:
        FitError: it is one of another tool, bound to the module in a way that cannot be
            undone, or one of TorchScript.
    """
    if isinstance(module, torch.jit.ScriptModule):
        raise FitError(
            "the layer was compiled by TorchScript, whose tensors are its own",
            where=where,
            hint="use the adapter with the model as it was before torch.jit",
        )
    given = module.__dict__.get(slot_of(module))
    if given is None:
        return _as_of_its_type
    if isinstance(given, MethodType) and given.__self__ is module:
        return given.__func__
    if isinstance(given, functools.partial) and given.args and given.args[0] is module:
        rest = given.args[1:]
        keywords = given.keywords
        inner = given.func
        return lambda self, *args, **kwargs: inner(
            self, *rest, *args, **{**keywords, **kwargs}
        )
    raise FitError(
        "another tool gave the layer a forward that cannot be run with other tensors",
        where=where,
        hint="use the adapter first and the other tool afterwards, or merge the adapter",
    )


def run(
    forward: Forward,
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """Return what the module gives with these tensors in the place of its own.

    Args:
        forward: from `forward_of`.
        module: it is not changed.
        tensors: names of parameters or buffers → what the forward sees there.
        args: what the module is called with.
        kwargs: what it is called with by name.
    """
    twin = object.__new__(type(module))
    held = twin.__dict__
    held.update(module.__dict__)
    slot = slot_of(module)
    if slot == "forward" and held.pop("forward", None) is not None:
        held["forward"] = MethodType(forward, twin)
    given = dict(held)
    for home in _OWN:
        changed = {name: new for name, new in tensors.items() if name in given[home]}
        if changed:
            _also_elsewhere(held, given[home], changed)
            held[home] = given[home] | changed
    before = dict(held)
    inside = {home: dict(held[home]) for home in _OWN}
    try:
        return forward(twin, *args, **kwargs)
    finally:
        _keep(module, held, before)
        for home in _OWN:
            if held[home] is not given[home]:
                _keep_inside(given[home], held[home], inside[home])


def _as_of_its_type(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return type(module).forward(module, *args, **kwargs)


def _also_elsewhere(
    held: dict[str, Any], own: Mapping[str, Tensor | None], changed: Mapping[str, Tensor]
) -> None:
    """Put new tensors where the module has its own once more, as LSTM in a flat list."""
    others = {id(own[name]): new for name, new in changed.items()}
    for key, value in held.items():
        if isinstance(value, Tensor):
            held[key] = others.get(id(value), value)
        elif type(value) in (list, tuple) and value and isinstance(value[0], Tensor):
            held[key] = type(value)(others.get(id(each), each) for each in value)


def _keep(module: nn.Module, held: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    for key, value in held.items():
        if value is not before.get(key, _MISSING):
            module.__dict__[key] = value


def _keep_inside(
    own: dict[str, Any], held: Mapping[str, Any], before: Mapping[str, Any]
) -> None:
    own.update(
        (name, value)
        for name, value in held.items()
        if value is not before.get(name, _MISSING)
    )
