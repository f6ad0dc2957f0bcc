"""The card, `README.md`: front matter that hubs read, then the author's own words.

The front matter is written from the manifest's facts, so that a card can never name
another base, task or licence than the package. What stood above the author's words before
is dropped.
"""

import json
import re
from collections.abc import Sequence

from lora_hub.package import spdx

_FRONT = re.compile(
    r"\A(?:\ufeff)?---[ \t]*\r?\n.*?^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE
)


def write_card(
    *,
    full_name: str,
    summary: str,
    license_expression: str,
    task: str,
    base_name: str | None,
    languages: Sequence[str] = (),
    body: str | None = None,
) -> str:
    """Return the text of the card.

    Args:
        full_name: namespace/name.
        summary: one line, the body where the author wrote none.
        license_expression: SPDX, checked.
        task: its first part is the hub's pipeline tag.
        base_name: what the hub calls the base; None where it is on no hub.
        languages: ISO 639 codes.
        body: the author's README, its front matter is replaced.
    """
    lines = [
        *([f"base_model: {_quoted(base_name)}"] if base_name else []),
        "base_model_relation: adapter",
        *([f"language: [{', '.join(map(_quoted, languages))}]"] if languages else []),
        "library_name: peft",
        *_license(license_expression),
        f"pipeline_tag: {task.partition('/')[0]}",
        "tags: [lora, lora-hub]",
    ]
    words = _FRONT.sub("", body, count=1) if body is not None else ""
    words = words.strip() or f"# {full_name}\n\n{summary}".strip()
    return "---\n" + "\n".join(lines) + "\n---\n\n" + words + "\n"


def _license(expression: str) -> list[str]:
    # Hubs know single identifiers, in lower case; anything else is "other" with a name.
    if spdx.identifiers(expression) == (expression,) and "Ref-" not in expression:
        return [f"license: {expression.lower()}"]
    return ["license: other", f"license_name: {_quoted(expression)}"]


def _quoted(text: str) -> str:
    return json.dumps(text)  # JSON strings are YAML strings
