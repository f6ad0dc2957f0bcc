"""Numbered files in a store, each naming the digest of the one before.

`000001.json`, `000002.json`, … An event is added by creating the file of the next number,
only if absent: the number is the compare-and-swap, so no writer is lost and none waits.
What the events mean is left to `registry.py`.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from lora_hub import digest
from lora_hub.errors import DocumentError, IntegrityError, NotFoundError, StoreError
from lora_hub.registry import documents
from lora_hub.registry.stores.protocol import Store

_NUMBERED = re.compile(r"[0-9]{6,9}\.json")

# At one number. A failed attempt means that another writer took it, and the next reading
# shows that: more are needed only where a listing is late.
_ATTEMPTS = 20

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


def seq_of(name: str) -> int | None:
    """Return the number of an event's file, None where the name is no event's."""
    if _NUMBERED.fullmatch(name):
        seq = int(name.removesuffix(".json"))
        if path_of("", seq) == f"/{name}":  # one number has one name
            return seq
    return None


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

    Raises:
        StoreError: something lies in the event's place that is no event.
    """
    attempts = Counter[int]()
    while True:
        chain = read(store, folder, kind)
        seq, prev = _follows(chain)
        attempts[seq] += 1
        if attempts[seq] > _ATTEMPTS:
            raise StoreError(
                "this is in the way of the next event",
                where=f"{store.where}/{path_of(folder, seq)}",
                hint="it is no file, or is listed by nobody; remove it",
            )
        event = build(chain, Link(seq, prev))
        if event is None:
            return None
        data = documents.encode(event)
        if store.write(path_of(folder, seq), [data], if_absent=True):
            return event


def _last(store: Store, folder: str) -> int:
    # Of a listing made while others write only the highest number counts: an event is
    # created when all before it exist, but a listing may have passed their places already.
    return max(
        (seq_of(path.removeprefix(f"{folder}/")) or 0 for path in store.list(folder)),
        default=0,
    )


def _follows(chain: Sequence[Recorded]) -> tuple[int, str | None]:
    return len(chain) + 1, digest.of_bytes(chain[-1].data) if chain else None
