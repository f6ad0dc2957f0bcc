"""The page of all rules, made from their table.

`docs/rules.md` holds what this returns; a test keeps the two equal, and
`python -m lora_hub.validation.rules_page` writes it anew.
"""

from pathlib import Path

from lora_hub.validation.rules import RULES

_HEAD = """# Rules of `lorahub validate`

Each has an id that does not change. An error is what cannot be applied or trusted and
gives exit code 1; a warning does so with `--fail-on warning`; a note never does. What you
decide to live with stands in a file of waivers: see [ci.md](ci.md).

Generated from `lora_hub/validation/rules.py`; do not edit.
"""


def text() -> str:
    """Return the page."""
    table = ["| id | what holds | severity |", "|---|---|---|"]
    table += [
        f"| [{rule}](#{rule.lower()}) | {row.title} | {row.severity} |"
        for rule, row in RULES.items()
    ]
    sections = [
        f"## {rule}\n\n**{_sentence(row.title)}** ({row.severity})\n\n"
        f"Why: {row.why}.\n\nMend: {row.mend}.\n"
        for rule, row in RULES.items()
    ]
    return "\n".join([_HEAD, *table, "", *sections])


def _sentence(title: str) -> str:
    return f"{title[0].upper()}{title[1:]}."


if __name__ == "__main__":
    Path("docs", "rules.md").write_text(text())
