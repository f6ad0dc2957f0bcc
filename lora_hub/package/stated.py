"""What an author states about a package, checked before anything is written.

A claim cannot be proved here; its form can, and what it must not give away.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lora_hub.errors import InputError
from lora_hub.formats.source import AdapterSource
from lora_hub.manifest.document import BaseHint
from lora_hub.manifest.tasks import TASKS
from lora_hub.package import layout, spdx

# What an author may state beyond the parameters of `plan_package`.
EXTRA_FIELDS = frozenset(
    {
        "evaluation",
        "ext",
        "homepage",
        "lineage",
        "prompt",
        "runtime",
        "source",
        "training",
    }
)

_HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}/[A-Za-z0-9][A-Za-z0-9_.-]{0,95}")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def hints_of(source: AdapterSource) -> tuple[BaseHint, ...]:
    """Return what the adapter's own config calls its base, unless that is a local path."""
    name = source.base_name
    # A folder here whose name looks like one on a hub is the user's own.
    if name is None or not _HUB_NAME.fullmatch(name) or Path(name).exists():
        return ()
    revision = source.base_revision
    is_pinned = revision is not None and _COMMIT.fullmatch(revision)
    return (BaseHint(hub="hf", repo=name, revision=revision if is_pinned else None),)


def check_license_text(expression: str, files: Iterable[str], src: Path) -> None:
    own = [name for name in spdx.identifiers(expression) if name.startswith("LicenseRef-")]
    if own and not any(layout.role_of(name) == "license" for name in files):
        raise InputError(
            f"{own[0]} is a licence of the author's own, and its text is missing",
            where=str(src),
            hint="put the text into the folder as LICENSE",
        )


def check_hints(hints: Iterable[BaseHint]) -> None:
    for hint in hints:
        # A path tells strangers about the author's machine and nobody about the base.
        if hint.repo.startswith(("/", ".", "~")) or "\\" in hint.repo:
            raise InputError(
                f"the base's name {hint.repo!r} is a local path, which is never published",
                hint="give the name under which others find the base, or none",
            )


def check_task(task: str) -> None:
    first = task.partition("/")[0]
    if first not in TASKS:
        near = difflib.get_close_matches(first, TASKS, n=1)
        raise InputError(
            f"{first!r} is no task",
            where="--task",
            hint=f"did you mean {near[0]}?"
            if near
            else f"one of {', '.join(sorted(TASKS))}",
        )


def check_extra(extra: Mapping[str, Any]) -> None:
    """Raise `InputError` unless these are fields that an author may state."""
    unknown = sorted(key for key in extra if key not in EXTRA_FIELDS)
    if unknown:
        raise InputError(
            f"{unknown[0]!r} cannot be stated here",
            hint=f"further fields are {', '.join(sorted(EXTRA_FIELDS))}",
        )
    training = extra.get("training")
    if isinstance(training, Mapping) and training.get("attested"):
        raise InputError(
            "attested is true, and no provenance travels with the package",
            where="training",
            hint="leave it out: what an author states is a claim",
        )
