"""One function over many arguments, some at a time, shared between processes.

Threads gain nothing here: most of the time of checking small adapters is the
interpreter's own. Where it is safe, the processes are copies of this one, which start in
milliseconds with everything loaded; else each starts a new interpreter, so a script that
asks for more than one guards its own start with `__main__`.
"""

import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

Argument = TypeVar("Argument")
Result = TypeVar("Result")

# How many arguments a process takes at once; fewer towards the end, so that all end
# together. Of packages as large as can be, so many manifests take 240 MB.
MOST = 16

# Collecting cycles after each of so many new objects: a check makes no cycles.
_SELDOM = 100_000

# Which linear algebra numpy may have been built with. Each process computes in one thread.
_THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


def chunks(
    arguments: Sequence[Argument], processes: int = 1
) -> Iterator[Sequence[Argument]]:
    """Give the arguments in their order, some at a time."""
    start = 0
    while start < len(arguments):
        left = len(arguments) - start
        end = start + min(MOST, 1 + left // (8 * processes))
        yield arguments[start:end]
        start = end


def shared(
    run: Callable[[Sequence[Argument]], Sequence[Result]],
    arguments: Sequence[Argument],
    processes: int,
) -> list[Result]:
    """Return what `run` gives for each of the arguments, in their order.

    Args:
        run: some arguments → as many results; of the top level of a module, or a partial
            of such; it changes nothing.
        arguments: one at least.
        processes: how many share the work, two at least.
    """
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    _load_numpy()
    # What is imported on the way, the copies need not import.
    first = run(arguments[:1])
    method = "fork" if _may_fork() else "spawn"
    context = multiprocessing.get_context(method)
    if method == "fork":
        gc.freeze()
    try:
        with ProcessPoolExecutor(processes, context, _begin) as pool:
            others = pool.map(run, chunks(arguments[1:], processes))
            return [*first, *(result for some in others for result in some)]
    finally:
        if method == "fork":
            gc.unfreeze()


def _may_fork() -> bool:
    """Return whether this process is one thread: a copy would have that one alone.

    A lock that another thread holds would stay held in the copy.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        return len(os.listdir("/proc/self/task")) == 1
    except OSError:
        return False


def _load_numpy() -> None:
    """Load numpy, its linear algebra in one thread if it was not loaded yet."""
    if "numpy" in sys.modules:
        return
    before = {name: os.environ.get(name) for name in _THREADS}
    os.environ.update(dict.fromkeys(_THREADS, "1"))
    try:
        import numpy  # noqa: F401, ICN001 - for its threads
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _begin() -> None:
    gc.set_threshold(_SELDOM)
    _load_numpy()
