"""Findings that somebody decided to live with: in a file, with a reason and until a day.

    [[waiver]]
    rule = "LH024"
    where = "legacy/*"
    reason = "trained before bases were recorded; replaced in the next release"
    until = 2027-03-31

`where` is a glob over files and folders, told from the folder of the waivers' file; a
folder covers what is in it. A waiver that has expired covers nothing and is a finding
itself, one that covers nothing is a note.

A file is believed where the user names it, or stands in its folder and has something else
checked. What lies in or beside what is checked may have come with it: it is a stranger's
word about a stranger's adapter, and only told of.
"""

import datetime as dt
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from lora_hub.errors import DocumentError, InputError
from lora_hub.validation.findings import Checked, Finding, finding
from lora_hub.validation.places import place_of
from lora_hub.validation.rules import RULES

WAIVERS_NAME = "lorahub-waivers.toml"
_MAX_BYTES = 1 << 20
_FIELDS = ("rule", "where", "reason", "until")


@dataclass(frozen=True, slots=True)
class Waiver:
    """One decision.

    Attributes:
        where: the glob, told from the folder of `file`.
        until: the last day it holds.
        file: whose waiver it is, as the user named it.
        index: its place in the file.
    """

    rule: str
    where: str
    reason: str
    until: dt.date
    file: str
    index: int

    def covers(self, one: Finding, subject: str) -> bool:
        """Return whether the finding about a subject is of this rule and place."""
        if one.rule != self.rule:
            return False
        folder = Path(os.path.abspath(self.file)).parent
        path = place_of(one.where, subject, root=folder).path
        parts = path.split("/")
        return any(
            fnmatchcase("/".join(parts[:end]), self.where)
            for end in range(1, len(parts) + 1)
        )


def own(checked: Sequence[Path]) -> tuple[Path, ...]:
    """Return the waivers' file of the working directory, if it is the user's own.

    It is not where the directory lies in what is checked, and thus came with it.

    Args:
        checked: the paths that were given, and the folders that they meant.
    """
    file = Path(WAIVERS_NAME)
    if not file.is_file():
        return ()
    here = Path(os.path.realpath(os.curdir))
    folders = (Path(os.path.realpath(path)) for path in checked)
    return () if any(here.is_relative_to(folder) for folder in folders) else (file,)


def not_believed(checked: Sequence[Path], believed: Sequence[Path]) -> tuple[Checked, ...]:
    """Return a note about each waivers' file in or beside what was checked, but for those.

    Args:
        checked: as for `own`.
        believed: the files whose waivers hold.
    """
    known = {os.path.realpath(file) for file in believed}
    found: dict[str, Path] = {}
    # Each once: a thousand adapters lie side by side in one folder.
    folders = dict.fromkeys(
        str(folder) for path in checked for folder in (path, path.parent)
    )
    for folder in folders:
        file = os.path.join(folder, WAIVERS_NAME)
        if os.path.lexists(file) and os.path.realpath(file) not in known:
            found.setdefault(os.path.realpath(file), Path(file))
    return tuple(
        Checked(str(file), (finding("LH065", str(file), "these waivers are not believed"),))
        for file in found.values()
    )


def read_waivers(file: Path) -> tuple[Waiver, ...]:
    """Return the waivers in a file.

    Raises:
        InputError: it cannot be read. DocumentError: it is no TOML, or a waiver lacks one
            of its four fields, has others, or names a rule that does not exist.
    """
    where = str(file)
    try:
        with file.open("rb") as stream:
            data = stream.read(_MAX_BYTES + 1)
        value = tomllib.loads(data.decode())
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=where) from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise DocumentError(f"is no TOML: {error}", where=where) from error
    items = value.get("waiver", [])
    if len(data) > _MAX_BYTES or value.keys() - {"waiver"} or not isinstance(items, list):
        raise DocumentError(
            "expected [[waiver]] tables and nothing else, 1 MiB at most", where=where
        )
    return tuple(_waiver(item, where, index) for index, item in enumerate(items))


def apply(
    checked: Sequence[Checked], waivers: Sequence[Waiver], *, today: dt.date
) -> tuple[Checked, ...]:
    """Return what was checked with its findings waived, then what is wrong with waivers."""
    standing = [waiver for waiver in waivers if today <= waiver.until]
    used: set[Waiver] = set()
    result = []
    for each in checked:
        findings = []
        for one in each.findings:
            covering = [waiver for waiver in standing if waiver.covers(one, each.subject)]
            used.update(covering)
            findings.append(replace(one, waived=covering[0].reason) if covering else one)
        result.append(Checked(each.subject, tuple(findings)))
    about: dict[str, list[Finding]] = {}
    for waiver in waivers:
        at = f"{waiver.file}#/waiver/{waiver.index}"
        what = f"the waiver of {waiver.rule} for {waiver.where!r}"
        if waiver not in standing:
            message = f"{what} has expired on {waiver.until.isoformat()}"
            about.setdefault(waiver.file, []).append(finding("LH060", at, message))
        elif waiver not in used:
            about.setdefault(waiver.file, []).append(
                finding("LH061", at, f"{what} covers nothing")
            )
    return (*result, *(Checked(file, tuple(found)) for file, found in about.items()))


def _waiver(item: Any, file: str, index: int) -> Waiver:
    where = f"{file}#/waiver/{index}"
    if not isinstance(item, Mapping) or set(item) != set(_FIELDS):
        raise DocumentError(
            f"a waiver has the fields {', '.join(_FIELDS)}, this one "
            f"{', '.join(sorted(item)) if isinstance(item, Mapping) else 'is no table'}",
            where=where,
        )
    for field in ("rule", "where", "reason"):
        if not isinstance(item[field], str) or not item[field].strip():
            raise DocumentError("expected a text", where=f"{where}/{field}")
    if item["rule"] not in RULES:
        raise DocumentError(f"{item['rule']!r} is no rule", where=f"{where}/rule")
    # A datetime is a date to Python, and a moment to TOML.
    if type(item["until"]) is not dt.date:
        raise DocumentError("expected a date, as 2027-03-31", where=f"{where}/until")
    return Waiver(**item, file=file, index=index)
