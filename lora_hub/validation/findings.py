"""`Finding`: one thing that validation has to say, and where."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from lora_hub.errors import LoraHubError
from lora_hub.validation.rules import RULES, SEVERITIES, Severity


@dataclass(frozen=True, slots=True)
class Finding:
    """One result of validation.

    Attributes:
        rule: id of a rule in `rules.py`.
        where: file, with a JSON pointer where that helps.
        hint: what to do.
        waived: the reason of the waiver that covers it; None where none does.
    """

    rule: str
    severity: Severity
    where: str
    message: str
    hint: str
    waived: str | None = None

    def fails(self, fail_on: Severity) -> bool:
        """Return whether this is at least as severe as `fail_on` and not waived."""
        return self.waived is None and SEVERITIES.index(self.severity) <= SEVERITIES.index(
            fail_on
        )


@dataclass(frozen=True, slots=True)
class Checked:
    """What was checked, as the user named it, and what was found there."""

    subject: str
    findings: tuple[Finding, ...]


def finding(rule: str, where: str, message: str, hint: str | None = None) -> Finding:
    """Return a finding with the rule's severity and, where none is given, its hint."""
    return Finding(rule, RULES[rule].severity, where, message, hint or RULES[rule].mend)


# So many findings of one rule are listed for one thing; of the others their number is told.
MOST = 100


def fewer(found: Iterable[Finding], where: str) -> list[Finding]:
    """Return at most `MOST` findings of each rule, with one more that counts the rest.

    A file of four megabytes can break one rule three hundred thousand times, and nobody
    reads, and no code scanning takes, that many results.
    """
    counts: Counter[str] = Counter()
    kept = []
    for one in found:
        counts[one.rule] += 1
        if counts[one.rule] <= MOST:
            kept.append(one)
    kept += [
        finding(rule, where, f"and {count - MOST} more of this rule are not listed")
        for rule, count in counts.items()
        if count > MOST
    ]
    return kept


def from_error(rule: str, error: LoraHubError, where: str) -> Finding:
    """Return what an error says as a finding at the error's own place, else at `where`."""
    return finding(rule, error.where or where, error.problem, error.hint)
