"""`Finding`: one thing that validation has to say, and where."""

from dataclasses import dataclass

from lora_hub.errors import LoraHubError
from lora_hub.validation.rules import RULES, Severity


@dataclass(frozen=True, slots=True)
class Finding:
    """One result of validation.

    Attributes:
        rule: id of a rule in `rules.py`.
        where: file, with a JSON pointer where that helps.
        hint: what to do.
    """

    rule: str
    severity: Severity
    where: str
    message: str
    hint: str


def finding(rule: str, where: str, message: str, hint: str | None = None) -> Finding:
    """Return a finding with the rule's severity and, where none is given, its hint."""
    return Finding(rule, RULES[rule].severity, where, message, hint or RULES[rule].mend)


def from_error(rule: str, error: LoraHubError, where: str) -> Finding:
    """Return what an error says as a finding at the error's own place, else at `where`."""
    return finding(rule, error.where or where, error.problem, error.hint)
