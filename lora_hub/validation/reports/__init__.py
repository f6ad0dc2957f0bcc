"""Findings as text for people and as JSON for programs; `REPORTS` is the table."""

from collections.abc import Callable, Mapping, Sequence

from lora_hub.validation.findings import Finding
from lora_hub.validation.reports import json, text

REPORTS: Mapping[str, Callable[[Sequence[Finding]], str]] = {
    "json": json.render,
    "text": text.render,
}
