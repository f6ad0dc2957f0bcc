"""`Step`: one call of the model, from its first layer to its last.

What acts is settled when the call begins and stays so until it ends, whatever other threads
or a swap do meanwhile. Each thread has its own steps. A layer that is called by itself,
outside of the model's forward, asks the host what acts now.
"""

import sys
import threading
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from torch import Tensor

from lora_hub.runtime.route import Route


@dataclass(slots=True, eq=False, weakref_slot=True)
class Step:
    """One call of the model.

    Attributes:
        route: what acts.
        shape: of what the model was given: rows, or rows and tokens; empty where unknown.
        awake: invocation tokens of an aLoRA → (rows, tokens), where it acts.
        shared: what layers that read one input leave for each other (`shrink.py`).
        frame: which call of torch's it is part of; None where that is not known. The
            frame itself and not its number, which another call may have later.
    """

    route: Route
    shape: tuple[int, ...] = ()
    awake: dict[tuple[int, ...], Tensor] = field(default_factory=dict)
    shared: dict[Any, Any] = field(default_factory=dict)
    frame: FrameType | None = None


class Steps(threading.local):
    """The open steps of the thread that asks, the innermost last."""

    def __init__(self) -> None:
        self.open: list[Step] = []

    @property
    def now(self) -> Step | None:
        return self.open[-1] if self.open else None

    def end(self) -> Step | None:
        """Close the innermost step and return it."""
        return self.open.pop() if self.open else None

    def forget_broken_off(self) -> list[Step]:
        """Close steps whose call is over although nobody was told, as after Ctrl-C."""
        if not self.open:
            return []
        running: set[FrameType | None] = {None}
        frame: FrameType | None = sys._getframe(1)  # noqa: SLF001  (has no public name)
        while frame is not None:
            running.add(frame)
            frame = frame.f_back
        broken = [step for step in self.open if step.frame not in running]
        self.open[:] = [step for step in self.open if step.frame in running]
        return broken
