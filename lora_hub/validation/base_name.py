"""Findings about what an adapter's config calls its base.

A name is a hint and never an identity, but it is all that a bare folder has.
"""

import re
from collections.abc import Callable
from typing import Any

from lora_hub.validation.findings import Finding, finding

# Ends and middles of names under which quantised copies are published.
_TWIN = re.compile(
    r"[-_.](?:bnb[-_]?\d+bit|[2-8]-?bit|gptq|awq|gguf|exl[23]|hqq|eetq|aqlm|nf4|fp8|"
    r"int[248]|w[48]a(?:8|16))(?=$|[-_.])",
    re.IGNORECASE,
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_DRIVE = re.compile(r"[A-Za-z]:[\\/]")


def is_local(name: str) -> bool:
    """Return whether the name is a path; names on hubs have one slash at most."""
    return (
        name.startswith(("/", ".", "~"))
        or "\\" in name
        or name.count("/") > 1
        or _DRIVE.match(name) is not None
    )


def check_base(name: Any, revision: Any, where: str) -> list[Finding]:
    """Return the findings about what an adapter calls its base, texts or nothing.

    Values of another kind are what the reader of the config refuses.
    """
    found = []
    if not isinstance(name, str):
        found.append(finding("LH024", where, "the adapter names no base"))
    else:
        for rule, is_so, problem in _NAMES:
            if is_so(name):
                found.append(finding(rule, where, problem))
                break
    if isinstance(revision, str) and _COMMIT.fullmatch(revision) is None:
        found.append(finding("LH027", where, f"the revision is {revision[:60]!r}"))
    return found


# The first that holds is said.
_NAMES: tuple[tuple[str, Callable[[str], bool], str], ...] = (
    ("LH024", is_local, "the base is named by a local path"),
    ("LH024", lambda name: not name.strip(), "the base is named by nothing"),
    (
        "LH025",
        lambda name: _TWIN.search(name) is not None,
        "the base is a quantised copy of another model",
    ),
    ("LH026", lambda name: "/" not in name, "the base is named without its owner"),
)
