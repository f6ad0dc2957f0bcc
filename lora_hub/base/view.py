"""`BaseView`: what can be asked of a base, be it a folder of files or a model in memory.

`base/folder.py` answers from a checkpoint folder without torch, `runtime/base_view.py`
from a live model. `base/fit.py` asks.
"""

import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from math import inf, prod
from typing import Protocol

from lora_hub.base import identity
from lora_hub.digest import hex_of
from lora_hub.manifest.document import BaseConfig

THREADS = max(2, os.cpu_count() or 1)

# recorded dtype → wider dtypes that hold each of its values exactly.
WIDER: Mapping[str, frozenset[str]] = {
    "BF16": frozenset({"F32", "F64"}),
    "F16": frozenset({"F32", "F64"}),
    "F32": frozenset({"F64"}),
}


class BaseView(Protocol):
    """A base that can be compared with what a manifest says."""

    @property
    def where(self) -> str:
        """What to call the base in messages."""

    @property
    def config(self) -> BaseConfig: ...

    @property
    def tensors(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """Name → dtype as safetensors spells it, and shape; tied tensors stand once."""

    def digest(self, name: str, as_dtype: str | None = None) -> str | None:
        """Return the digest of a tensor's bytes, row-major and little endian.

        With `as_dtype`, of the tensor converted to that dtype, or None unless it was
        widened from it (`WIDER`) and every value survives the way back. Called from
        several threads at once.
        """


def digests(view: BaseView, wanted: Iterable[tuple[str, str | None]]) -> list[str | None]:
    """Return `view.digest(name, as_dtype)` for each pair, in order.

    Hashing releases the interpreter's lock, so threads share the work: the largest tensors
    first, so that none is left to one thread when the others are done.
    """
    pairs = list(wanted)
    found: list[str | None] = [None] * len(pairs)
    sizes = {name: prod(shape) for name, (_, shape) in view.tensors.items()}
    # A weight that is stored in parts has no size of its own; it is large.
    largest_first = sorted(
        range(len(pairs)), key=lambda index: -sizes.get(pairs[index][0], inf)
    )
    left = iter(largest_first)  # each thread takes the next

    def work() -> None:
        try:
            for index in left:
                found[index] = view.digest(*pairs[index])
        except BaseException:
            for _ in left:  # nothing that is still to be hashed matters any more
                pass
            raise

    with ThreadPoolExecutor(THREADS) as pool:
        for done in [pool.submit(work) for _ in range(min(len(pairs), THREADS))]:
            done.result()
    return found


def root_of(view: BaseView, as_dtype: str | None = None) -> str | None:
    """Return the root over all tensors of a view.

    With `as_dtype`, the root that the base had before its tensors were widened from that
    dtype, or None where one was not. A base that mixed dtypes and was then widened to one
    is not recognised.
    """
    wider = WIDER.get(as_dtype, frozenset()) if as_dtype else frozenset()
    kept = {
        name: as_dtype if as_dtype and dtype in wider else dtype
        for name, (dtype, _) in view.tensors.items()
    }
    leaves = {}
    for (name, dtype), found in zip(kept.items(), digests(view, kept.items()), strict=True):
        if found is None:
            return None
        content = bytes.fromhex(hex_of(found))
        leaves[name] = identity.leaf(name, dtype, view.tensors[name][1], content)
    return identity.root(leaves)


def struct_of(view: BaseView) -> str:
    """Return the structure's digest of a view; reads no tensor."""
    return identity.struct((name, shape) for name, (_, shape) in view.tensors.items())
