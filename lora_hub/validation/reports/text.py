"""Findings as text: two lines each, then how many there are."""

from collections.abc import Sequence

from lora_hub.validation.findings import Checked, Finding
from lora_hub.validation.rules import SEVERITIES, Severity


def render(checked: Sequence[Checked], fail_on: Severity = "error") -> str:
    """Return the text; a waived finding is marked and gives the waiver's reason."""
    findings = [one for each in checked for one in each.findings]
    return "\n".join([*map(_finding, findings), summary(findings)])


def summary(findings: Sequence[Finding]) -> str:
    """Return how many findings there are of each severity, and how many are waived."""
    counts = [
        f"{count} {severity}{'s' if count > 1 else ''}"
        for severity in SEVERITIES
        if (count := sum(one.severity == severity and not one.waived for one in findings))
    ]
    waived = sum(one.waived is not None for one in findings)
    if waived:
        counts.append(f"{waived} waived")
    return ", ".join(counts) or "no findings"


def unicode(text: str) -> str:
    """Return the text with bytes of names that are no UTF-8 made visible.

    Python tells them as halves of surrogate pairs, which strict readers of JSON refuse.
    """
    return text.encode(errors="backslashreplace").decode()


def _finding(one: Finding) -> str:
    mark = "" if one.waived is None else "waived "
    # A line break in a name or a text would begin a line that looks like ours.
    first, second = (
        text.replace("\n", "\\u000a")
        for text in (
            f"{mark}{one.severity} {one.rule} {one.where}: {one.message}",
            one.waived or one.hint,
        )
    )
    return f"{first}\n    {second}"
