"""What a registry asks of a place that keeps bytes: six verbs.

Paths are relative, parts joined with `/`, letters, digits and `._-`, no leading dot:
`index/style/milton/000001.json`. A path has a whole file or none; "only if absent" is the
one condition a registry needs, so every place that can create a file exclusively will do.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from lora_hub.errors import StoreError

_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,119}")


@dataclass(frozen=True, slots=True)
class Stat:
    """What is known of a file without reading it."""

    size_bytes: int


class Store(Protocol):
    """A place that keeps bytes. `where` names it in messages."""

    @property
    def where(self) -> str: ...

    def read(self, path: str, *, max_bytes: int | None = None) -> bytes:
        """Return the file's bytes.

        Raises:
            NotFoundError: nothing is there.
            IntegrityError: it has more than `max_bytes`.
            StoreError: it cannot be read.
        """

    def chunks(self, path: str) -> Iterator[bytes]:
        """Yield the file's bytes in pieces; errors as `read`."""

    def write(
        self, path: str, chunks: Iterable[bytes | memoryview], *, if_absent: bool
    ) -> bool:
        """Keep the chunks as one file; return whether it was written.

        With `if_absent` an existing file stays and False is returned: of many writers at
        once exactly one gets True.
        """

    def stat(self, path: str) -> Stat | None:
        """Return what is known of the file, None where nothing is there."""

    def list(self, prefix: str) -> Iterator[str]:
        """Yield the paths below the folder `prefix` ("" for all), sorted."""

    def delete(self, path: str) -> None:
        """Remove the file; nothing there is fine."""


def check_path(path: str) -> tuple[str, ...]:
    """Return the parts of a path.

    Raises:
        StoreError: the path does not follow the grammar above, so it could lead out of
            the store.
    """
    parts = tuple(path.split("/"))
    if not all(_PART.fullmatch(part) for part in parts):
        raise StoreError(f"{path!r} is no path of a store")
    return parts
