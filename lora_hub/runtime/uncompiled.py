"""Functions that torch.compile leaves as they are.

It sees neither threads nor what is kept from one call to the next.
"""

import functools
import sys
import typing
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch._C._dynamo import eval_frame

_P = ParamSpec("_P")
_T = TypeVar("_T")


def uncompiled(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Return the function so that compiled code calls it as Python.

    `torch.compiler.disable` takes a second and 80 MB to import, so it waits until somebody
    compiles.
    """
    disabled: list[Callable[_P, _T]] = []

    @functools.wraps(function)
    @typing.no_type_check  # torch.compile may read it
    def called(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if not disabled:
            disable = torch.compiler.disable
            disabled.append(disable(function))
        return disabled[0](*args, **kwargs)

    return uncompiled_alone(called)


def uncompiled_alone(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Return the function, run as it is where what is not compiled calls it.

    Torch calls the hooks of a compiled model from code that it does not compile, and would
    compile each as a program of its own. Inside of a compiled program it is compiled along.
    """
    # What `torch._dynamo.skip` does, without importing the compiler.
    skip = eval_frame._FrameAction.SKIP  # noqa: SLF001  (has no public name)
    default = eval_frame._FrameAction.DEFAULT  # noqa: SLF001
    strategy = eval_frame._FrameExecStrategy(skip, default)  # noqa: SLF001
    eval_frame.set_code_exec_strategy(function.__code__, strategy)
    return function
