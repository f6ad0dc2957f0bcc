"""Findings as text: two lines each, then how many there are."""

from collections.abc import Sequence

from lora_hub.validation.findings import Finding


def render(findings: Sequence[Finding]) -> str:
    """Return the text; it ends without a newline."""
    lines = []
    for one in findings:
        lines.append(f"{one.severity} {one.rule} {one.where}: {one.message}")
        lines.append(f"    {one.hint}")
    counts = [
        f"{count} {severity}{'s' if count > 1 else ''}"
        for severity in ("error", "warning", "note")
        if (count := sum(one.severity == severity for one in findings))
    ]
    return "\n".join([*lines, ", ".join(counts) or "no findings"])
