"""Findings about texts that show a reader something else than what is there.

Control characters and escape sequences steer a terminal; bidirectional overrides reorder
what is shown (https://trojansource.codes). Line breaks and tabs are texts' own.
"""

import itertools
import re
from collections.abc import Iterator
from typing import Any

from lora_hub.validation.findings import MOST, Finding, finding

_STEERING = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)

# What ASCII shows, line breaks and tabs.
_SHOWN = bytes([*b"\t\n\r", *range(0x20, 0x7F)])


# More of one document are not counted.
_MOST = 10 * MOST


def check_text(text: str, where: str) -> list[Finding]:
    """Return a finding where the text holds characters that steer what is shown."""
    # Nothing that steers is printable, and this is told a hundred times as fast.
    found = [] if text.isprintable() else sorted(set(_STEERING.findall(text)))
    if not found:
        return []
    names = ", ".join(f"U+{ord(character):04X}" for character in found[:5])
    return [finding("LH014", where, f"the text holds {names}")]


def check_texts(value: Any, where: str) -> list[Finding]:
    """Return the findings about all texts of a JSON value, keys too."""
    found = (
        one for text, at in _texts(value, "") for one in check_text(text, f"{where}#{at}")
    )
    return list(itertools.islice(found, _MOST))


def check_document(data: bytes, value: Any, where: str) -> list[Finding]:
    """Return the findings about all texts of a JSON document, keys too.

    Args:
        data: the document; where nothing is escaped in it, it shows all texts at once.
        value: what it spells.
        where: its name.
    """
    if b"\\" not in data:
        if data.isascii() and not data.translate(None, _SHOWN):
            return []
        text = data.decode(errors="replace")
        if text.isprintable() or not _STEERING.search(text):
            return []
    return check_texts(value, where)


def _texts(value: Any, at: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield value, at or "/"
    elif isinstance(value, dict):
        for key, item in value.items():
            part = f"{at}/{_plain(key)}"
            yield key, part
            yield from _texts(item, part)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _texts(item, f"{at}/{index}")


def _plain(key: str) -> str:
    shown = _STEERING.sub(lambda match: f"\\u{ord(match[0]):04x}", key)
    return shown.replace("~", "~0").replace("/", "~1")
