"""Findings as one JSON document."""

import dataclasses
import json
from collections.abc import Sequence

from lora_hub.validation.findings import Checked
from lora_hub.validation.reports.text import unicode
from lora_hub.validation.rules import Severity


def render(checked: Sequence[Checked], fail_on: Severity = "error") -> str:
    """Return `{"findings": […]}`, the fields of each being those of `Finding`."""
    findings = [
        {
            name: unicode(value) if isinstance(value, str) else value
            for name, value in dataclasses.asdict(one).items()
        }
        for each in checked
        for one in each.findings
    ]
    return json.dumps({"findings": findings}, indent=2)
