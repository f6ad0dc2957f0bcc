"""Numbered files in a store, each naming the digest of the one before.

`000001.json`, `000002.json`, … An event is added by creating the file of the next number,
only if absent: the number is the compare-and-swap, so no writer is lost and none waits.
What the events mean is left to `registry.py`.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from lora_hub import digest
from lora_hub.errors import DocumentError, IntegrityError, NotFoundError, StoreError
from lora_hub.registry import documents
from lora_hub.registry.stores.protocol import Store

_NUMBERED = re.compile(r"(\d{6,9})\.json")

# Each failed attempt means that another writer succeeded, so this is met only where a
# store says "exists" of a file it does not list.
_ATTEMPTS = 10_000

_HINT = "run `lorahub registry check`; the registry's owner has to restore the file"


@dataclass(frozen=True, slots=True)
class Recorded:
    """An event and the bytes it was read from."""

    event: Any
    data: bytes


@dataclass(frozen=True, slots=True)
class Link:
    """Where the next event goes: its number and the digest of the event before it."""

    seq: int
    prev: str | None


def path_of(folder: str, seq: int) -> str:
    return f"{folder}/{seq:06d}.json"


def read(store: Store, folder: str, kind: Any) -> tuple[Recorded, ...]:
    """Return the events in a folder of the store, oldest first; none is fine.

    Raises:
        IntegrityError: a number is missing, or an event does not follow from the one
            before it, or cannot be read.
    """
    chain: list[Recorded] = []
    for seq in range(1, _last(store, folder) + 1):
        where = f"{store.where}/{path_of(folder, seq)}"
        try:
            data = store.read(path_of(folder, seq), max_bytes=documents.MAX_EVENT_BYTES)
            event = documents.decode(data, kind, where=where)
        except NotFoundError as error:
            raise IntegrityError("the event is missing", where=where, hint=_HINT) from error
        except DocumentError as error:
            raise IntegrityError(
                f"the event cannot be read: {error.problem}", where=error.where, hint=_HINT
            ) from error
        if (event.seq, event.prev) != _follows(chain):
            raise IntegrityError(
                "the event does not follow from the one before it: an event was changed, "
                "moved or removed",
                where=where,
                hint=_HINT,
            )
        chain.append(Recorded(event, data))
    return tuple(chain)


def append(
    store: Store,
    folder: str,
    kind: Any,
    build: Callable[[tuple[Recorded, ...], Link], msgspec.Struct | None],
) -> Any:
    """Add the event that `build` makes from the chain so far; return it.

    `build` is asked again when another writer took the number, and may then answer None:
    nothing to add.
    """
    for _ in range(_ATTEMPTS):
        chain = read(store, folder, kind)
        seq, prev = _follows(chain)
        event = build(chain, Link(seq, prev))
        if event is None:
            return None
        data = documents.encode(event)
        if store.write(path_of(folder, seq), [data], if_absent=True):
            return event
    raise StoreError(
        f"no event could be added in {_ATTEMPTS} attempts", where=f"{store.where}/{folder}"
    )


def _last(store: Store, folder: str) -> int:
    # Of a listing made while others write only the highest number counts: an event is
    # created when all before it exist, but a listing may have passed their places already.
    numbers = (
        int(match[1])
        for path in store.list(folder)
        if (match := _NUMBERED.fullmatch(path.removeprefix(f"{folder}/")))
    )
    return max(numbers, default=0)


def _follows(chain: Sequence[Recorded]) -> tuple[int, str | None]:
    return len(chain) + 1, digest.of_bytes(chain[-1].data) if chain else None
