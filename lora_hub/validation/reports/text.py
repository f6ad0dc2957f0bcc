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


def _finding(one: Finding) -> str:
    mark = "" if one.waived is None else "waived "
    first = f"{mark}{one.severity} {one.rule} {one.where}: {one.message}"
    return f"{first}\n    {one.waived or one.hint}"
