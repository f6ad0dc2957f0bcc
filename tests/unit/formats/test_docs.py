"""The tables of docs/formats.md are those of the code."""

from pathlib import Path

import pytest

from lora_hub.formats.detect import DIALECTS
from lora_hub.formats.dialect import FEATURES

DOCS = Path(__file__).parents[3] / "docs/formats.md"
KINDS = {"language", "components"}


def says():
    """Return the table of what each dialect can say."""
    head = ["| | " + " | ".join(DIALECTS) + " |", "|---" * (len(DIALECTS) + 1) + "|"]
    return head + [
        f"| `{feature}`: {words} | "
        + " | ".join("yes" if feature in row.says else "" for row in DIALECTS.values())
        + " |"
        for feature, words in FEATURES.items()
    ]


def losses():
    """Return the table of what is refused on the way from one dialect to another."""
    head = [
        "| from, to | " + " | ".join(DIALECTS) + " |",
        "|---" * (len(DIALECTS) + 1) + "|",
    ]
    return head + [
        f"| {one.name} | " + " | ".join(lost(one, two) for two in DIALECTS.values()) + " |"
        for one in DIALECTS.values()
    ]


def lost(one, two):
    if not one.says & two.says & KINDS:
        return "everything"
    # In the order of the table above.
    words = [feature for feature in FEATURES if feature in one.says - two.says]
    return ", ".join(words) or "nothing"


@pytest.mark.parametrize("table", [says, losses])
def test_table_in_the_docs_is_that_of_the_code(table):
    wanted = "\n".join(table())

    assert wanted in DOCS.read_text(), f"put this into {DOCS.name}:\n{wanted}"


def test_every_dialect_has_a_row_that_says_its_files():
    text = DOCS.read_text()

    for dialect in DIALECTS.values():
        assert f"`{dialect.name}`" in text
        assert f"`{dialect.weights_name}`" in text
