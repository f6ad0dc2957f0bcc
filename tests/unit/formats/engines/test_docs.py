"""docs/engines.md says what the table of engines says."""

from pathlib import Path

import pytest

from lora_hub.formats.engines.refused import FEATURES
from lora_hub.formats.engines.table import ENGINES

DOCS = Path(__file__).parents[4] / "docs/engines.md"


def refused():
    """Return the table of what is refused for which engine, and why."""
    head = ["| | " + " | ".join(ENGINES) + " |", "|---" * (len(ENGINES) + 1) + "|"]
    return head + [
        f"| {words} | "
        + " | ".join(engine.cannot.get(name, "said") for engine in ENGINES.values())
        + " |"
        for name, (words, _) in FEATURES.items()
    ]


def sources():
    """Return the table of where each engine says what it reads."""
    head = ["| `--for` | engine | read at | where |", "|---|---|---|---|"]
    return head + [
        f"| `{engine.name}` | {engine.title} | {engine.read_at} | {engine.source} |"
        for engine in ENGINES.values()
    ]


@pytest.mark.parametrize("table", [sources, refused])
def test_table_in_the_docs_is_that_of_the_code(table):
    wanted = "\n".join(table())

    assert wanted in DOCS.read_text(), f"put this into {DOCS.name}:\n{wanted}"
