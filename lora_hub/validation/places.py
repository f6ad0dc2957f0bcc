"""Where a finding lies, in words that are the same on every machine.

`where` of a finding is made for people: the path as they gave it, then a JSON pointer or
a tensor. Programs that keep findings (code scanning, waivers) want the file apart, below
the folder they stand in, and nothing of the machine the check ran on.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

# `lorahub.json#/base/root`, `adapter_model.safetensors: name.of.a.tensor`
_INSIDE = re.compile(r"(?:#/|: )")


@dataclass(frozen=True, slots=True)
class Place:
    """A file or folder, and what in it.

    Attributes:
        path: with forward slashes, below the working directory where it lies there; else
            it begins with the name of what was checked.
        inside: a JSON pointer, a tensor or a package of a registry; empty for the whole.
    """

    path: str
    inside: str = ""


def place_of(where: str, subject: str, root: Path | None = None) -> Place:
    """Return the place of a finding about `subject`.

    Args:
        where: the finding's.
        subject: the folder or file that was checked, as the user named it.
        root: what paths are told from; the working directory without.
    """
    shown = _shown(subject, root or Path.cwd())
    rest = where.removeprefix(subject)
    if (rest == where and subject) or rest[:1] not in ("", "/", os.sep, "#", ":"):
        return Place(
            shown or ".", where
        )  # a package in a registry: not a file of that name
    match = _INSIDE.search(rest)
    end = match.start() if match else len(rest)
    inside = rest[end:].removeprefix(": ").removeprefix("#")
    below = rest[:end].replace(os.sep, "/").strip("/")
    return Place("/".join(part for part in (shown, below) if part) or ".", inside)


def _shown(subject: str, root: Path) -> str:
    """Return the subject below the root, its own name elsewhere; empty for the root."""
    path = Path(os.path.abspath(subject))
    if path.is_relative_to(root):
        return path.relative_to(root).as_posix().removeprefix(".")
    return path.name
