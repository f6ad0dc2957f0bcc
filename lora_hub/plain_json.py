"""JSON bytes that are spelt plainly → their value, ten times as fast as `strict_json.py`.

Most documents that programs write are spelt in one way: no white space between the parts,
ASCII without escapes. If a value written back in that way gives the same bytes, then these
held no key twice, no odd number and nothing behind the end: whatever a lenient parser may
forgive would not come back. Anything else gets None here and is read the slow way, which
also says what is wrong.
"""

from typing import Any

# Deleting all but these from a document leaves its brackets and the quotes of its texts.
_BRACKETS = b'[]{}"'
_NO_BRACKETS = bytes(set(range(256)) - set(_BRACKETS))

# As many rounds of taking out empty brackets, two levels at most each.
_ROUNDS = 16
MAX_DEPTH = 2 * _ROUNDS

# Digits as 0, and what may stand before a number as a colon.
_NUMBERS = bytes.maketrans(b"0123456789,[-", b"0000000000:::")
_LONG_NUMBER = b":" + 16 * b"0"


def decode(data: bytes) -> Any | None:
    """Return the value of a document of at most `MAX_DEPTH` levels that is spelt plainly.

    Members may stand in any order, and spaces and line breaks behind the value.
    """
    import msgspec

    text = data.rstrip(b" \n")
    if not _is_plain(text):
        return None
    try:
        value = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return value if msgspec.json.encode(value) == text else None


def decode_canonical(data: bytes) -> Any | None:
    """Return the value of a document that is spelt plainly and in its canonical form.

    Documents with fractions or numbers of more than 15 digits get None: how these are spelt
    is the matter of `canonical.py`.
    """
    import msgspec

    if not _is_plain(data) or _LONG_NUMBER in data.translate(_NUMBERS):
        return None
    try:
        value = msgspec.json.Decoder(float_hook=_refuse).decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, _Fraction):
        return None
    return value if msgspec.json.encode(value, order="sorted") == data else None


class _Fraction(Exception):
    pass


def _refuse(text: str) -> float:
    raise _Fraction(text)


def _is_plain(data: bytes) -> bool:
    """Return whether nothing is escaped, and the brackets nest at most so deep."""
    if b"\\" in data or not data.isascii():
        return False
    # Without escapes, every other quote ends a text. Those of a text that holds a bracket
    # do not stand side by side and stay.
    brackets = data.translate(None, _NO_BRACKETS).replace(b'""', b"")
    if b'"' in brackets:
        return False
    for _ in range(_ROUNDS):
        if not brackets:
            return True
        brackets = brackets.replace(b"[]", b"").replace(b"{}", b"")
    return not brackets
