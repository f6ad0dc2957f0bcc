"""JSON bytes → value, refusing what parsers disagree about.

Two readers that understand one document differently are how a checked file turns
into another one when it is used. So duplicate keys, NaN, byte order marks, trailing
bytes, halves of surrogate pairs, deep nesting and sizes beyond a limit are errors here.
Documents in which none of that can be are known by their spelling (`plain_json.py`).
"""

import json
import os
import re
import stat
from pathlib import Path
from typing import Any, NoReturn

from lora_hub import plain_json
from lora_hub.errors import DocumentError

MAX_BYTES = 4 << 20
MAX_DEPTH = 32


def decode(data: bytes, *, where: str, max_bytes: int = MAX_BYTES) -> Any:
    """Return the value of one strict UTF-8 JSON document.

    Raises:
        DocumentError: the bytes are not one well-formed document, or hold a key twice,
            a number that is not finite, or more than `max_bytes` or `MAX_DEPTH` levels.
    """
    if len(data) > max_bytes:
        raise DocumentError(
            f"the document has {len(data)} bytes, at most {max_bytes} are read",
            where=where,
        )
    plain = plain_json.decode(data)
    if plain is not None:
        return plain
    _refuse_lfs_pointer(data, where)
    _check_depth(data, where)
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_object,
            parse_constant=_constant,
            parse_float=_float,
        )
        if _SURROGATE.search(data):
            _refuse_halves(value)
    except UnicodeDecodeError as error:
        raise DocumentError(
            f"byte {error.start} is not UTF-8; JSON documents are UTF-8", where=where
        ) from error
    except json.JSONDecodeError as error:
        raise DocumentError(
            f"not JSON: {error.msg} at line {error.lineno}, column {error.colno}",
            where=where,
        ) from error
    except _Refused as error:
        raise DocumentError(str(error), where=where) from error
    except ValueError as error:  # an integer of more digits than Python converts
        raise DocumentError(
            "not JSON: a number has more than 4300 digits", where=where
        ) from error
    return value


def decode_object(data: bytes, *, where: str, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """Return the value of a document whose top level must be an object."""
    value = decode(data, where=where, max_bytes=max_bytes)
    if not isinstance(value, dict):
        raise DocumentError(
            f"the document is a {type(value).__name__}, expected an object", where=where
        )
    return value


def read_object(path: Path, *, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """Return the object in a file; the file is read to one byte past the limit at most."""
    try:
        with open(path, "rb", opener=_opener) as stream:
            if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                raise DocumentError("is no regular file", where=str(path))
            data = stream.read(max_bytes + 1)
    except OSError as error:
        raise DocumentError(f"cannot be read: {error.strerror}", where=str(path)) from error
    return decode_object(data, where=str(path), max_bytes=max_bytes)


def _opener(path: str, flags: int) -> int:
    # Without O_NONBLOCK, opening a named pipe would wait for its writer.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


class _Refused(Exception):
    pass


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _Refused(f"the key {key!r} stands twice in one object")
            seen.add(key)
    return value


def _constant(text: str) -> NoReturn:
    raise _Refused(f"{text} is no JSON number")


def _float(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise _Refused(f"the number {text[:40]} is beyond what a float holds")
    return value


_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def _refuse_halves(value: Any) -> None:
    # Python takes half of a pair for a character, which no UTF-8 can spell.
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise _Refused("a text holds half of a surrogate pair") from error


def _refuse_lfs_pointer(data: bytes, where: str) -> None:
    if data.startswith(b"version https://git-lfs.github.com/spec/"):
        raise DocumentError(
            "this is a Git LFS pointer, not the file itself",
            where=where,
            hint="fetch the content with `git lfs pull`",
        )


# The closing quote is optional and nothing is tried twice: a text that never ends is read
# once, and not once more from each quote in it.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_BRACKET = re.compile(rb"[\[\]{}]")


def _check_depth(data: bytes, where: str) -> None:
    # Before parsing: the parser recurses, and a document can be deeper than a stack.
    depth = 0
    for bracket in _BRACKET.findall(_STRING.sub(b"", data)):
        depth += 1 if bracket in b"[{" else -1
        if depth > MAX_DEPTH:
            raise DocumentError(
                f"the document nests more than {MAX_DEPTH} levels deep", where=where
            )
