"""A store in a local folder, shared by any number of processes without a lock file.

A file gets its name in one step (`atomic.py`), so a reader finds it whole and of many
writers one creates it. Symbolic links inside the folder are not followed: whoever can put
one there could otherwise point us anywhere.
"""

import contextlib
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from lora_hub import atomic
from lora_hub.digest import CHUNK_BYTES
from lora_hub.errors import IntegrityError, NotFoundError, StoreError
from lora_hub.registry.stores.protocol import Stat, check_path

# Not on Windows, which has neither: there `_locate` alone refuses links.
_OPEN = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)


class LocalStore:
    """Keeps files below an existing folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.where = str(folder)

    def read(self, path: str, *, max_bytes: int | None = None) -> bytes:
        place = self._locate(path)
        with _opened(place) as stream:
            size_bytes = os.fstat(stream.fileno()).st_size
            if max_bytes is not None and size_bytes > max_bytes:
                raise IntegrityError(
                    f"the file has {size_bytes} bytes, at most {max_bytes} are read",
                    where=str(place),
                    hint="another file took its place, or it grew",
                )
            return stream.read(size_bytes)

    def chunks(self, path: str) -> Iterator[bytes]:
        with _opened(self._locate(path)) as stream:
            while chunk := stream.read(CHUNK_BYTES):
                yield chunk

    def write(
        self, path: str, chunks: Iterable[bytes | memoryview], *, if_absent: bool
    ) -> bool:
        place = self._locate(path)
        if if_absent:
            return atomic.write_new(place, chunks)
        atomic.replace(place, chunks)
        return True

    def stat(self, path: str) -> Stat | None:
        place = self._locate(path)
        try:
            return Stat(place.lstat().st_size)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise _cannot("read", error, place) from error

    def list(self, prefix: str) -> Iterator[str]:
        top = self._locate(prefix) if prefix else self.folder
        yield from sorted(self._walk(top))

    def delete(self, path: str) -> None:
        place = self._locate(path)
        try:
            place.unlink(missing_ok=True)
        except OSError as error:
            raise _cannot("removed", error, place) from error

    def _walk(self, top: Path) -> Iterator[str]:
        try:
            with os.scandir(top) as entries:
                found = list(entries)
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            raise _cannot("listed", error, top) from error
        for entry in found:
            # What a killed writer left is no file yet.
            if entry.name.startswith(atomic.TEMPORARY):
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from self._walk(Path(entry.path))
            else:
                yield Path(entry.path).relative_to(self.folder).as_posix()

    def _locate(self, path: str) -> Path:
        place = self.folder
        for part in check_path(path):
            place /= part
            try:
                is_link = place.is_symlink()
            except OSError as error:
                raise _cannot("read", error, place) from error
            if is_link:
                raise StoreError(
                    "is a symbolic link, which is not followed inside a registry",
                    where=str(place),
                )
        return place


@contextlib.contextmanager
def _opened(place: Path) -> Iterator[BinaryIO]:
    """Give the regular file opened for reading, with errors of ours."""
    try:
        # O_NONBLOCK: a pipe of this name would otherwise hold us for ever.
        with open(place, "rb", opener=_opener) as stream:
            if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                raise StoreError("is no regular file", where=str(place))
            yield stream
    except (FileNotFoundError, NotADirectoryError):
        raise NotFoundError("there is no such file", where=str(place)) from None
    except OSError as error:
        raise _cannot("read", error, place) from error


def _opener(path: str, _flags: int) -> int:
    return os.open(path, _OPEN)


def _cannot(verb: str, error: OSError, place: Path) -> StoreError:
    return StoreError(
        f"cannot be {verb}: {error.strerror or error}",
        where=str(error.filename or place),
        hint="check its permissions",
    )
