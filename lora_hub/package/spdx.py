"""The form of a licence: an SPDX expression.

Checks how the expression is written; that its identifiers are on SPDX's list, which grows
every month, is asked apart (`unlisted`).
Source: https://spdx.github.io/spdx-spec/v3.0.1/annexes/spdx-license-expressions/.
"""

import functools
import re
from itertools import accumulate

from lora_hub.errors import InputError

_TOKEN = re.compile(r"\s*([()]|[^\s()]+)")
_LICENSE = re.compile(
    r"(?:DocumentRef-[A-Za-z0-9.-]+:)?LicenseRef-[A-Za-z0-9.-]+|[A-Za-z0-9.-]+\+?"
)
_EXCEPTION = re.compile(r"[A-Za-z0-9.-]+")
_MAX_CHARACTERS = 500  # as the manifest has it
_MAX_DEPTH = 20
_OPERATORS = ("AND", "OR", "WITH")

# Words that people write where a licence is meant and that SPDX has no identifier for.
_NO_LICENSES = frozenset({"other", "unknown", "none", "noassertion", "proprietary", "free"})


# Here and below: who checks many packages meets the same few licences.
@functools.lru_cache(maxsize=256)
def check_license(text: str) -> None:
    """Raise `InputError` unless the text is an SPDX expression by its form."""
    if len(text) > _MAX_CHARACTERS:
        raise _bad(
            text, f"it has {len(text)} characters, expected {_MAX_CHARACTERS} at most"
        )
    tokens = _TOKEN.findall(text)
    if _depth(tokens) > _MAX_DEPTH:
        raise _bad(text, "its parentheses nest too deep")
    try:
        if _expression(tokens, text) or not text.strip():
            raise _bad(text, "it goes on where it should end")
    except IndexError:
        raise _bad(text, "it ends where an identifier is expected") from None


def identifiers(text: str) -> tuple[str, ...]:
    """Return the licences of a checked expression, in order."""
    tokens = _TOKEN.findall(text)
    return tuple(
        token
        for before, token in zip(["", *tokens], tokens, strict=False)
        if token not in ("(", ")", *_OPERATORS) and before != "WITH"
    )


@functools.lru_cache(maxsize=256)
def unlisted(text: str) -> tuple[str, ...]:
    """Return the licences of a checked expression that are not on SPDX's list.

    The list is that of the installed `packaging`. A licence of the author's own
    (`LicenseRef-…`) has no place on it.
    """
    from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

    found = []
    for name in identifiers(text):
        try:
            if "LicenseRef-" not in name:
                canonicalize_license_expression(name)
        except InvalidLicenseExpression:
            found.append(name)
    return tuple(found)


def _depth(tokens: list[str]) -> int:
    steps = {"(": 1, ")": -1}
    return max(accumulate(steps.get(token, 0) for token in tokens), default=0)


def _expression(tokens: list[str], text: str) -> list[str]:
    """Return what is left behind one expression. AND and OR need no ranking here."""
    rest = _term(tokens, text)
    while rest and rest[0] in ("AND", "OR"):
        rest = _term(rest[1:], text)
    return rest


def _term(tokens: list[str], text: str) -> list[str]:
    first, rest = tokens[0], tokens[1:]
    if first == "(":
        rest = _expression(rest, text)
        if rest[0] != ")":
            raise _bad(text, f"{rest[0]!r} stands where ')' is expected")
        return rest[1:]
    if first in _OPERATORS or first.upper() in _OPERATORS or not _LICENSE.fullmatch(first):
        raise _bad(text, f"{first!r} stands where an identifier is expected")
    if first.lower() in _NO_LICENSES:
        raise _bad(text, f"{first!r} names no licence")
    if rest and rest[0] == "WITH":
        if not _EXCEPTION.fullmatch(rest[1]):
            raise _bad(text, f"{rest[1]!r} is no exception's identifier")
        return rest[2:]
    return rest


def _bad(text: str, problem: str) -> InputError:
    shown = text if len(text) <= 80 else f"{text[:77]}..."
    return InputError(
        f"the licence {shown!r} is no SPDX expression: {problem}",
        hint="for example Apache-2.0, MIT OR Apache-2.0, or LicenseRef-Name with a LICENSE "
        "file; the list is at spdx.org/licenses",
    )
