"""Findings as one JSON document."""

import dataclasses
import json
from collections.abc import Sequence

from lora_hub.validation.findings import Finding


def render(findings: Sequence[Finding]) -> str:
    """Return `{"findings": [{"rule", "severity", "where", "message", "hint"}, …]}`."""
    value = {"findings": [dataclasses.asdict(one) for one in findings]}
    return json.dumps(value, indent=2)
