"""What may reach a terminal: text of strangers without control characters, one JSON value.

stdout carries data, stderr talk. Names, summaries and reasons come from manifests that
anyone may have written; an escape sequence in them could repaint the screen.
"""

import contextlib
import json
import os
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_hub.registry.problem import Problem

# Control, format (bidirectional overrides among them), surrogate and private characters.
_REFUSED = frozenset({"Cc", "Cf", "Cs", "Co"})


def clean(text: str) -> str:
    """Return the text with everything that could steer a terminal made visible."""
    return "\n".join(map(line, text.split("\n")))


def line(text: str) -> str:
    """Return the text as one line: as `clean`, and line breaks made visible as well."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        f"\\u{ord(character):04x}"
        if unicodedata.category(character) in _REFUSED
        else character
        for character in text
    )


def out(text: str) -> None:
    """Print data."""
    print(clean(text))


def talk(text: str) -> None:
    """Print what is said beside the data."""
    print(clean(text), file=sys.stderr)


def note(text: str) -> None:
    """Print what a person should hear although nothing went wrong."""
    talk(f"note: {text}")


def out_json(value: Any) -> None:
    """Print one JSON document; documents and dataclasses are taken as they are."""
    import msgspec

    # Paths are what msgspec does not know by itself.
    plain = msgspec.to_builtins(value, enc_hook=os.fspath)
    print(json.dumps(plain, ensure_ascii=True, indent=2))


def problems(found: "Sequence[Problem]") -> None:
    """Print what is wrong, each with its hint."""
    for problem in found:
        print(line(f"{problem.where}: {problem.message}"))
        if problem.hint:
            print(f"  hint: {line(problem.hint)}")


def size(size_bytes: int) -> str:
    """Return a size a person can read, in decimal units."""
    if size_bytes < 1000:
        return f"{size_bytes} B"
    amount, units = size_bytes / 1000, ["GB", "MB", "kB"]
    while amount >= 1000 and len(units) > 1:
        amount /= 1000
        units.pop()
    return f"{amount:.1f} {units[-1]}"


def table(rows: list[tuple[str, ...]]) -> None:
    """Print rows in columns as wide as their widest cell."""
    if not rows:
        return
    rows = [tuple(line(cell) for cell in row) for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print(
            "  ".join(
                cell.ljust(width) for cell, width in zip(row, widths, strict=True)
            ).rstrip()
        )


@contextlib.contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Give a function `(done, total)` that draws a bar where there is a terminal."""
    if not sys.stderr.isatty():
        yield lambda _done, _total: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
