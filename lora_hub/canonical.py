"""A JSON value as canonical bytes: one value, one spelling (RFC 8785).

Digests and signatures are over bytes, so every document of ours has one byte form.
Reading is the matter of `strict_json.py`.
"""

import json
import re
from typing import Any

from lora_hub.errors import DocumentError

_MAX_CHARACTERS = 120

# A number that is written in another way here and there: with a fraction, an exponent or
# more than 15 digits, or none that JSON has. Numbers stand behind these; so may texts, and
# the slow way is right for them too.
_ODD_NUMBER = re.compile(r'(?:^|":|,|\[)-?(?:\d+[.eE]|\d{16}|NaN|Infinity)')


def encode(value: Any, *, where: str | None = None) -> bytes:
    """Return the RFC 8785 form of a value made of dict, list, str, int, float, bool, None.

    Raises:
        DocumentError: the value holds NaN, an infinity, or an integer beyond 2**53,
            which JSON numbers cannot carry exactly, or half of a surrogate pair.
    """
    plain = _plain(value)
    if plain is not None:
        return plain
    import rfc8785

    try:
        return rfc8785.dumps(value)
    except rfc8785.CanonicalizationError as error:
        problem = str(error)
        if len(problem) > _MAX_CHARACTERS:  # it quotes the number
            problem = f"{problem[:_MAX_CHARACTERS]}…"
        raise DocumentError(
            f"the value has no canonical JSON form: {problem}", where=where
        ) from error


def _plain(value: Any) -> bytes | None:
    """Return the form where the standard library writes the same, thirty times as fast.

    It does for texts and small integers. It writes other numbers in another way, and sorts
    names with characters behind the surrogates in another order.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    except (TypeError, ValueError):
        return None
    is_odd = not text.isascii() and max(text) >= "\ud800"
    return None if is_odd or _ODD_NUMBER.search(text) else text.encode()
