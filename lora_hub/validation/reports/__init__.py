"""Findings in the words of whoever reads them; `REPORTS` is the table.

Each takes what was checked and the lowest severity that fails, and returns the text
without a newline at its end.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence

from lora_hub.validation.findings import Checked
from lora_hub.validation.rules import Severity

Render = Callable[[Sequence[Checked], Severity], str]


def _in(file: str) -> Render:
    """Return the report of a file here, which is imported when a report is written: what
    SARIF and JUnit need takes a tenth of the start-up.
    """

    def render(checked: Sequence[Checked], fail_on: Severity) -> str:
        module = importlib.import_module(f"{__name__}.{file}")
        text: str = module.render(checked, fail_on)
        return text

    return render


REPORTS: Mapping[str, Render] = {
    form: _in(form) for form in ("text", "json", "sarif", "junit", "github")
}
