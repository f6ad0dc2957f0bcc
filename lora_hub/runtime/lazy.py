"""`Lazy`, a tensor of the model with a change in it that is not worked out.

It stands where a module has its parameter while the module's forward runs. What models do
with such a parameter is answered by its form (`experts.py`, `new_rows.py`) out of the
model's own tensor and the change, each apart; what a form does not know is asked of the
dense tensor, which is right and as large as the parameter.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from lora_hub.errors import InputError

# What torch is asked, then with what → the answer, or NotImplemented.
Answer = Callable[..., Any]


@runtime_checkable
class Form(Protocol):
    """A tensor and its change."""

    @property
    def own(self) -> Tensor:
        """The model's tensor, of the same shape, dtype and device."""

    def dense(self) -> Tensor:
        """Return the tensor with the change in it."""

    def answer(self, func: Any) -> Answer | None:
        """Return how to answer what torch is asked, None where that is not known."""


class Lazy(Tensor):
    """A tensor in a form of its own. Made by `lazy`.

    It has no memory: what would read it past the functions below fails aloud.
    """

    form: Form

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Answer what torch is asked to do with it; called by torch."""
        kwargs = kwargs or {}
        if func in _TOLD:
            with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001
                return func(*args, **kwargs)
        for form in _forms((args, tuple(kwargs.values()))):
            answer = form.answer(func)
            found = NotImplemented if answer is None else answer(func, *args, **kwargs)
            if found is not NotImplemented:
                return found
        return _asked_dense(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch calls it so
        cls,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Ask the dense tensor what came past `__torch_function__`; called by torch."""
        return _asked_dense(func, args, kwargs or {})


def lazy(form: Form) -> Lazy:
    """Return a tensor in this form, for the time of a forward."""
    own = form.own
    made = Tensor._make_wrapper_subclass(  # noqa: SLF001  (torch's own name)
        Lazy,
        own.shape,
        strides=own.stride(),
        storage_offset=0,
        dtype=own.dtype,
        device=own.device,
    )
    assert isinstance(made, Lazy)
    made.form = form
    return made


def dense(value: Any) -> Any:
    """Return a lazy tensor's dense one, anything else as it is."""
    return value.form.dense() if isinstance(value, Lazy) else value


class Exact:
    """A block without autocast, which would round what is computed in a wider dtype."""

    __slots__ = ("_off",)

    def __init__(self, like: Tensor) -> None:
        kind = like.device.type
        on = torch.is_autocast_enabled(kind)
        self._off = torch.autocast(kind, enabled=False) if on else None

    def __enter__(self) -> None:
        if self._off is not None:
            self._off.__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *told: object) -> None:
        if self._off is not None:
            self._off.__exit__(*told)


def _forms(given: tuple[Any, ...]) -> list[Form]:
    # By type: to ask more of a tensor would be a question of its own.
    return [each.form for group in given for each in group if type(each) is Lazy]


def _asked_dense(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    name = getattr(getattr(func, "_schema", None), "name", getattr(func, "__name__", ""))
    writes = name in ("__setitem__", "__set__") or (
        name.endswith("_") and not name.endswith("__")
    )
    if writes and args and isinstance(args[0], Lazy):
        raise InputError(
            f"a module writes to its weight ({name}) in its forward, while an adapter "
            "changes that weight",
            hint="merge the adapter instead",
        )
    args, kwargs = tree_map(dense, (args, dict(kwargs)))
    return func(*args, **kwargs)


# What tells of the tensor without its numbers, as of any of that shape.
_TOLD = {
    *(getattr(Tensor, name) for name in ("dim", "size", "stride", "numel", "nelement")),
    *(getattr(Tensor, name) for name in ("ndimension", "element_size", "__len__")),
    *(getattr(Tensor, name) for name in ("is_floating_point", "is_complex", "get_device")),
    *(getattr(Tensor, name) for name in ("is_contiguous", "storage_offset", "__hash__")),
    *(
        getattr(Tensor, name).__get__
        for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad")
    ),
    *(
        getattr(Tensor, name).__get__
        for name in ("is_cuda", "is_cpu", "is_meta", "is_leaf", "grad_fn", "itemsize")
    ),
    torch.numel,
    torch.is_floating_point,
    torch.is_complex,
}
