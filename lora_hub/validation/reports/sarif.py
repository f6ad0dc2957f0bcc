"""Findings as SARIF 2.1.0, for code scanning.

Rules with why and how to mend, results with a place that is the same on every machine, a
fingerprint by which a finding is known again in the next run, and waivers as suppressions.
Source: https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any
from urllib.parse import quote

from lora_hub.validation.findings import Checked, Finding
from lora_hub.validation.places import Place, place_of
from lora_hub.validation.reports.text import unicode
from lora_hub.validation.rules import RULES, Severity

SCHEMA = (
    "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/"
    "sarif-schema-2.1.0.json"
)
_INDEX = {rule: index for index, rule in enumerate(RULES)}


def render(checked: Sequence[Checked], fail_on: Severity = "error") -> str:
    """Return the document: one run with all rules and all findings."""
    seen: Counter[str] = Counter()
    run = {
        "tool": {
            "driver": {
                "name": "lorahub",
                "semanticVersion": version("lora-hub"),
                "rules": [_rule(rule) for rule in RULES],
            }
        },
        "columnKind": "unicodeCodePoints",
        "results": [
            _result(one, place_of(one.where, each.subject), seen)
            for each in checked
            for one in each.findings
        ],
    }
    return json.dumps({"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}, indent=2)


def _rule(rule: str) -> dict[str, Any]:
    row = RULES[rule]
    return {
        "id": rule,
        "shortDescription": {"text": row.title},
        "fullDescription": {"text": row.why},
        "help": {"text": row.mend},
        "defaultConfiguration": {"level": row.severity},
    }


def _result(one: Finding, place: Place, seen: Counter[str]) -> dict[str, Any]:
    fingerprint = _fingerprint(one, place, seen)
    location: dict[str, Any] = {
        "physicalLocation": {
            "artifactLocation": {"uri": quote(place.path, errors="replace")},
            "region": {"startLine": 1},  # code scanning takes no result without a line
        }
    }
    if place.inside:
        location["logicalLocations"] = [{"fullyQualifiedName": unicode(place.inside)}]
    return {
        "ruleId": one.rule,
        "ruleIndex": _INDEX[one.rule],
        "level": one.severity,
        "message": {"text": unicode(f"{one.message}. {one.hint}")},
        "locations": [location],
        "fingerprints": {"lorahub/v1": fingerprint},
        # By this name code scanning knows a result again; it would hash the line else.
        "partialFingerprints": {"primaryLocationLineHash": fingerprint},
        "suppressions": _suppressions(one),
    }


def _suppressions(one: Finding) -> list[dict[str, str]]:
    if one.waived is None:
        return []
    return [
        {"kind": "external", "status": "accepted", "justification": unicode(one.waived)}
    ]


def _fingerprint(one: Finding, place: Place, seen: Counter[str]) -> str:
    """Return what stays the same while rule and place do; messages hold counts."""
    text = f"{one.rule}\n{place.path}\n{place.inside}"
    seen[text] += 1
    return f"{hashlib.sha256(text.encode(errors='replace')).hexdigest()[:32]}:{seen[text]}"
