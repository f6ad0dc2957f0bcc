from pathlib import Path

from lora_hub.validation import rules_page
from lora_hub.validation.rules import RULES

PAGE = Path(__file__).parents[3] / "docs" / "rules.md"


def test_page_is_what_the_table_says():
    assert PAGE.read_text() == rules_page.text()


def test_page_has_a_section_for_every_rule():
    assert [f"\n## {rule}\n" in rules_page.text() for rule in RULES] == [True] * len(RULES)
