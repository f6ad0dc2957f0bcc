"""Findings as workflow commands of GitHub Actions, which shows them beside the files.

    ::error file=verse/lorahub.json,title=LH003 …::the document is not in canonical form

A waived finding is a plain line: it stays in the log and annotates nothing.
Source: https://docs.github.com/en/actions/reference/workflows-and-actions/workflow-commands
and the escapes of github.com/actions/toolkit, packages/core/src/command.ts.
"""

from collections.abc import Sequence

from lora_hub.validation.findings import Checked, Finding
from lora_hub.validation.places import place_of
from lora_hub.validation.reports.text import summary
from lora_hub.validation.rules import RULES, Severity

_COMMANDS = {"error": "error", "warning": "warning", "note": "notice"}


def render(checked: Sequence[Checked], fail_on: Severity = "error") -> str:
    """Return one line a finding, then how many there are."""
    lines = [_line(one, each.subject) for each in checked for one in each.findings]
    return "\n".join([*lines, summary([one for each in checked for one in each.findings])])


def _line(one: Finding, subject: str) -> str:
    place = place_of(one.where, subject)
    message = f"{place.inside}: {one.message}" if place.inside else one.message
    if one.waived is not None:
        return (
            f"waived {one.rule} {_data(place.path)}: {_data(message)} ({_data(one.waived)})"
        )
    title = f"{one.rule} {RULES[one.rule].title}"
    return (
        f"::{_COMMANDS[one.severity]} file={_property(place.path)},"
        f"title={_property(title)}::{_data(f'{message}. {one.hint}')}"
    )


def _data(text: str) -> str:
    # The percent sign first: the others bring new ones.
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
