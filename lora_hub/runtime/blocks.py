"""`Blocks`: open `using` and `rows` blocks, and which of them the code that asks is in.

A block belongs to the thread or the asyncio task that opened it, and to what they start
with a copy of their context (`asyncio.to_thread`, tasks made inside of the block).

A generator that stands still inside of a block is another matter: Python goes on in whoever
asked it for a value, in the same context. Its block is found by the generator's frame: it
acts while that frame runs, in whatever thread, and where somebody else runs meanwhile and
it would act there too, the call is refused. What `contextlib.contextmanager` made of a
generator opens its blocks for the code that entered it, as one means it to.

Source: PEP 567 (context variables), and PEP 568, which would have given generators theirs.
"""

import inspect
import sys
import threading
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Generic, TypeVar

from lora_hub.errors import InputError

_T = TypeVar("_T")

_GENERATOR = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR


@dataclass(slots=True, eq=False)
class Block(Generic[_T]):
    """One `with` block.

    Attributes:
        what: it asks for; None once it is closed, since copies of its context live on.
        generator: the frame of the generator that opened it, by its number, which stays
            its own as long as the block is open; 0 for other code.
        inside: the generators in whose frames it was opened, likewise.
        thread: where it was opened.
    """

    what: _T | None
    generator: int = 0
    inside: frozenset[int] = frozenset()
    thread: int = field(default_factory=threading.get_ident)
    is_open: bool = True


# The innermost last; of all hosts.
_OPENED: ContextVar[tuple[Block[Any], ...]] = ContextVar("lora_hub blocks", default=())


class Blocks(Generic[_T]):
    """The blocks of one host. No lock is needed, so that they end wherever they end.

    Attributes:
        open: of all threads, in the order in which they were opened.
    """

    def __init__(self) -> None:
        self.open: list[Block[_T]] = []

    @property
    def now(self) -> _T | None:
        """What the innermost block asks for that the caller is in.

        Raises:
            InputError: it was opened by a generator that stands still.
        """
        if not self.open:
            return None
        opened = _OPENED.get()
        mine = [each for each in tuple(self.open) if each.is_open and each in opened]
        if not any(each.generator for each in tuple(self.open)):
            return mine[-1].what if mine else None
        running = _running()
        generator = self._innermost_generator(running)
        if generator:
            mine = [
                each
                for each in tuple(self.open)
                if each.generator == generator
                or (generator in each.inside and each in mine)
            ]
        if not mine:
            return None
        last = mine[-1]
        is_still = last.generator and last.generator not in running
        if is_still and last.thread == threading.get_ident():
            raise InputError(
                "a generator stands still inside of a block of `using` or `rows`, so "
                "whether that is to act here is not known",
                hint="open a block here, too; or let the generator leave its block before "
                "it yields, or run in a thread or a task of its own",
            )
        return last.what

    def new(self, what: _T) -> Block[_T]:
        """Return a block of the code that enters the `with`, to begin and to end."""
        opener = _opener(sys._getframe(1))  # noqa: SLF001  (has no public name)
        is_generator = opener is not None and _is_generator(opener)
        return Block(what, id(opener) if is_generator else 0)

    def begin(self, block: Block[_T]) -> None:
        """Let a block act."""
        generators = {each.generator for each in tuple(self.open)} - {0}
        if generators:
            block.inside = frozenset(generators.intersection(_running()))
        self.open.append(block)
        _OPENED.set((*_OPENED.get(), block))

    def end(self, block: Block[_T]) -> None:
        """Close a block, wherever it was opened; one that never began is fine."""
        block.is_open, block.what = False, None
        if block in self.open:
            self.open.remove(block)
        opened = _OPENED.get()
        if block in opened:
            _OPENED.set(tuple(each for each in opened if each.is_open))

    def _innermost_generator(self, running: dict[int, int]) -> int:
        """Return the generator nearest to the caller that has a block open; 0 if none."""
        found = [each.generator for each in tuple(self.open) if each.generator in running]
        return min(found, key=running.__getitem__, default=0)


def _opener(frame: FrameType | None) -> FrameType | None:
    """Return the frame that entered the `with`, beyond what makes context managers."""
    while frame is not None and not _is_contextlib(frame):
        frame = frame.f_back  # the host's own
    while _is_contextlib(frame):
        while frame is not None and _is_contextlib(frame):
            frame = frame.f_back
        above = frame
        while above is not None and _is_generator(above) and not _is_contextlib(above):
            above = above.f_back
        if _is_contextlib(above):  # which made a context manager of the generator
            frame = above
    return frame


def _is_generator(frame: FrameType) -> bool:
    return bool(frame.f_code.co_flags & _GENERATOR)


def _is_contextlib(frame: FrameType | None) -> bool:
    return frame is not None and frame.f_globals.get("__name__") == "contextlib"


def _running() -> dict[int, int]:
    """Return the frames of this thread by their numbers, with how far up they are."""
    found: dict[int, int] = {}
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001  (has no public name)
    while frame is not None:
        found[id(frame)] = len(found)
        frame = frame.f_back
    return found
