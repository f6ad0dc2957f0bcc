"""Changes of documents, byte by byte and by what they spell; a seed gives the same ones."""

import copy
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

# Values that a reader may not expect in a place.
NASTY: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 255, 1 << 31, 1 << 53, (1 << 53) + 1, 1 << 63, 1 << 64,
    -(1 << 63), 10**400, 0.5, -0.0, 1e308, 5e-324, float("nan"), float("inf"), "", " ", "0",
    "\0", "\x1b[2J", "\u202e", "\ud800", "\U0010ffff", "a" * 5000, "../x", "/etc/x", "..",
    "sha256:" + "0" * 64, "LORA", "F32", "(a|a)*b", "(", [], [[]], {}, {"": None}, [0, 1],
    [1, 0], [0] * 300, {"a": {"b": {"c": []}}}, ["a", 1, None], {"__proto__": 1},
)  # fmt: skip

Path = tuple[Any, ...]


def bytes_of(data: bytes, rng: random.Random) -> bytes:
    """Return the bytes with one to four changes."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(changed) + 1)
        size = rng.choice((1, 1, 2, 4, 8, 64))
        rng.choice(_BYTES)(changed, at, size, rng)
    return bytes(changed)


def _flip(data: bytearray, at: int, size: int, rng: random.Random) -> None:
    if at < len(data):
        data[at] ^= 1 << rng.randrange(8)


def _set(data: bytearray, at: int, size: int, rng: random.Random) -> None:
    data[at : at + size] = rng.randbytes(size)


def _insert(data: bytearray, at: int, size: int, rng: random.Random) -> None:
    data[at:at] = rng.randbytes(size)


_SPELT = (b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":", b"-", b"9", b"e", b"\\ud800")


def _spell(data: bytearray, at: int, size: int, rng: random.Random) -> None:
    data[at:at] = rng.choice(_SPELT)


def _remove(data: bytearray, at: int, size: int, rng: random.Random) -> None:
    del data[at : at + size]


def _repeat(data: bytearray, at: int, size: int, rng: random.Random) -> None:
    data[at:at] = data[at : at + size] * rng.randint(1, 8)


def _cut(data: bytearray, at: int, size: int, rng: random.Random) -> None:
    del data[at:]


_BYTES = (_flip, _set, _insert, _spell, _remove, _repeat, _cut)


def value_of(value: Any, rng: random.Random) -> Any:
    """Return a copy of a JSON value with one to three changes of what it says."""
    changed = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        places = list(_places(changed))
        if not places:
            return changed
        *path, last = rng.choice(places)
        inside = changed
        for step in path:
            inside = inside[step]
        rng.choice(_VALUES)(inside, last, rng)
    return changed


def text_of(value: Any, rng: random.Random) -> bytes:
    """Return the value as JSON, now and then with a piece of it standing twice."""
    text = json.dumps(value, sort_keys=rng.random() < 0.5)
    if rng.random() < 0.2 and "," in text:
        parts = text.split(",")
        at = rng.randrange(len(parts))
        text = ",".join([*parts[:at], parts[at], *parts[at:]])
    return text.encode()


def _places(value: Any, at: Path = ()) -> Iterator[Path]:
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, item in items:
        yield (*at, key)
        yield from _places(item, (*at, key))


def _put(inside: Any, key: Any, rng: random.Random) -> None:
    inside[key] = copy.deepcopy(rng.choice(NASTY))


def _drop(inside: Any, key: Any, rng: random.Random) -> None:
    del inside[key]


def _rename(inside: Any, key: Any, rng: random.Random) -> None:
    if isinstance(inside, dict):
        inside[rng.choice(("", "x", f"{key}\0", str(key).upper(), f"x-{key}"))] = (
            inside.pop(key)
        )


def _wrap(inside: Any, key: Any, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 1, 2, 40))):
        inside[key] = [inside[key]] if rng.random() < 0.5 else {"a": inside[key]}


def _swap(inside: Any, key: Any, rng: random.Random) -> None:
    other = rng.choice(list(inside) if isinstance(inside, dict) else range(len(inside)))
    inside[key], inside[other] = inside[other], inside[key]


def _add(inside: Any, key: Any, rng: random.Random) -> None:
    if isinstance(inside, dict):
        inside[f"x{rng.randrange(9)}"] = copy.deepcopy(inside[key])
    else:
        inside += [copy.deepcopy(inside[key])] * rng.choice((1, 2, 300))


def _nudge(inside: Any, key: Any, rng: random.Random) -> None:
    item = inside[key]
    if isinstance(item, str):
        at = rng.randrange(len(item) + 1)
        inside[key] = (
            item[:at]
            + rng.choice(("", "\0", ".", "/", "é", "x" * 99, "\u202e"))
            + item[at + 1 :]
        )
    elif isinstance(item, bool) or item is None:
        inside[key] = not item
    elif isinstance(item, int | float) and abs(item) < 1e300:
        inside[key] = rng.choice(
            (item + 1, item - 1, -item, item * 2, item / 2, float(item), str(item))
        )


_VALUES: tuple[Callable[[Any, Any, random.Random], None], ...] = (
    _put, _put, _drop, _rename, _wrap, _swap, _add, _nudge, _nudge,
)  # fmt: skip
