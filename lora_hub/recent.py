"""What was worked out lately, by all that it was worked out of.

Folders of many adapters hold the same beginnings over and over: one header, one config,
one base, and other numbers. Who reads many need not take the same bytes apart each time.
A key is the whole of what the result follows from: bytes that are equal, or values that
are the very same ones (`RecentOfSame`). Only what nobody changes is kept; errors never are.
"""

from collections.abc import Hashable
from typing import Any, Generic, TypeVar

Value = TypeVar("Value")

# So many entries are kept, of keys that are bytes up to this size: some 20 MB at most.
MOST = 16
MAX_KEY_BYTES = 256 << 10
_MOST_MET = 64


class Recent(Generic[Value]):
    """The last few results of one function; the one that was not asked for longest goes.

    A result is kept when it was worked out a second time. Keeping what never comes again
    has its price too: new values then lie where the processor's caches do not reach.
    """

    __slots__ = ("_kept", "_met")

    def __init__(self) -> None:
        self._kept: dict[Hashable, Value] = {}
        self._met: dict[int, None] = {}  # hashes of keys

    def get(self, key: Hashable) -> Value | None:
        """Return what was kept under this key, None where nothing is."""
        value = self._kept.pop(key, None)
        if value is not None:
            self._kept[key] = value  # behind the others
        return value

    def keep(self, key: Hashable, value: Value) -> None:
        """Remember a value, which is not None, from its second time on."""
        if hash(key) in self._met:
            self._kept[key] = value
            _shorten(self._kept, MOST)
        else:
            self._met[hash(key)] = None
            _shorten(self._met, _MOST_MET)


def _shorten(entries: dict[Any, Any], most: int) -> None:
    # Another thread may do the same.
    for oldest in list(entries)[:-most] if len(entries) > most else ():
        entries.pop(oldest, None)


class RecentOfSame(Generic[Value]):
    """As `Recent`, for results that follow from values which are kept, the very same."""

    __slots__ = ("_recent",)

    def __init__(self) -> None:
        self._recent: Recent[tuple[tuple[Any, ...], Value]] = Recent()

    def get(self, *values: Any) -> Value | None:
        found = self._recent.get(tuple(map(id, values)))
        return None if found is None else found[1]

    def keep(self, *values: Any, result: Value) -> None:
        # While the values are kept, nothing else can have their place in memory.
        self._recent.keep(tuple(map(id, values)), (values, result))
