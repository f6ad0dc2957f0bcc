"""Findings in the words of whoever reads them; `REPORTS` is the table.

Each takes what was checked and the lowest severity that fails, and returns the text
without a newline at its end.
"""

from collections.abc import Callable, Mapping, Sequence

from lora_hub.validation.findings import Checked
from lora_hub.validation.reports import github, json, junit, sarif, text
from lora_hub.validation.rules import Severity

REPORTS: Mapping[str, Callable[[Sequence[Checked], Severity], str]] = {
    "text": text.render,
    "json": json.render,
    "sarif": sarif.render,
    "junit": junit.render,
    "github": github.render,
}
