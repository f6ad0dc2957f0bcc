"""Names by words, base, task and rank, from the index alone: no manifest is read."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lora_hub import refs
from lora_hub.registry.documents import PublishEvent
from lora_hub.registry.registry import Entry, Registry

if TYPE_CHECKING:
    from packaging.version import Version


def search(
    registry: Registry,
    words: Sequence[str] = (),
    *,
    base_root: str | None = None,
    task: str | None = None,
    max_rank: int | None = None,
) -> tuple[Entry, ...]:
    """Return the version of each name that satisfies everything asked.

    The highest release is taken, as `latest` means it, and a pre-release only where no
    release satisfies. Withdrawn versions do not count.

    Args:
        registry: where.
        words: each must stand in the name, the summary, the task or the targets.
        base_root: the fingerprint of the base it was made for.
        task: a task with or without its free part: text-generation[/verse].
        max_rank: the highest rank the user's engine takes.
    """
    found = []
    for name in registry.names():
        for entry in sorted(registry.versions(name), key=_preference, reverse=True):
            event = entry.event
            if (
                entry.yanked is None
                and all(word.casefold() in _text(event) for word in words)
                and base_root in (None, event.base.root)
                and task in (None, event.task, event.task.partition("/")[0])
                and (max_rank is None or event.max_rank <= max_rank)
            ):
                found.append(entry)
                break
    return tuple(found)


def _preference(entry: Entry) -> "tuple[bool, Version]":
    version = refs.parse_version(entry.version)
    return not version.is_prerelease, version


def _text(event: PublishEvent) -> str:
    return " ".join((event.name, event.summary, event.task, *event.target_names)).casefold()
