"""Files and folders that are there whole or not at all.

Everything durable goes through here: write a temporary sibling, flush it to the disk,
then give it its name in one step. There are no lock files: who comes second is told so
by the file system. A process killed at any moment leaves at most a temporary sibling
(`.tmp-…`), which nothing reads; `sweep`, and the next attempt at the same folder, remove
those that are a day old.
"""

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from lora_hub.errors import StoreError

TEMPORARY = ".tmp-"
# A temporary file older than this belongs to a process that is gone.
STALE_S = 24 * 3600


def write_new(
    path: Path, chunks: Iterable[bytes | memoryview], *, mode: int = 0o644
) -> bool:
    """Create the file unless something has the name already; return whether we did.

    `os.link` is the one call that gives a complete file its name and fails when the
    name is taken, on local disks and on NFS alike.
    """
    with _errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _temporary_file(path, chunks, mode) as temporary:
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
            _flush_folder(path.parent)
            return True


def replace(path: Path, chunks: Iterable[bytes | memoryview], *, mode: int = 0o644) -> None:
    """Write the file, taking the place of what has the name now."""
    with _errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _temporary_file(path, chunks, mode) as temporary:
            os.replace(temporary, path)
            _flush_folder(path.parent)


def rename(path: Path, new: Path) -> None:
    """Give a file another name in its folder, unless something has that name already.

    Raises:
        StoreError: the name is taken, or the folder cannot be written.
    """
    with _errors(new):
        os.link(path, new, follow_symlinks=False)
        path.unlink()
        _flush_folder(new.parent)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder to fill; when the block ends well it becomes `path`.

    Raises:
        StoreError: `path` exists and is not an empty folder, or cannot be written.
    """
    with _errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise StoreError(
                "exists already and is not empty",
                where=str(path),
                hint="name a folder that does not exist yet, or remove this one",
            )
        temporary = Path(
            tempfile.mkdtemp(prefix=f"{TEMPORARY}{path.name}-", dir=path.parent)
        )
    try:
        with _errors(path):
            # Not a glob: the name may hold any character.
            siblings = [
                sibling
                for sibling in path.parent.iterdir()
                if sibling.name.startswith(f"{TEMPORARY}{path.name}-")
            ]
        _remove_stale(siblings, STALE_S)
        yield temporary
        with _errors(path):
            temporary.chmod(0o755)
            for file in temporary.rglob("*"):
                if file.is_file():
                    _flush(file)
            # rename(2) takes the place of an empty folder and of nothing else.
            os.rename(temporary, path)
            _flush_folder(path.parent)
    except StoreError as error:
        # The name the user gave, not the one only we know.
        error.where = error.where and error.where.replace(str(temporary), str(path))
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sweep(folder: Path, *, older_than_s: float = STALE_S) -> int:
    """Remove temporary siblings that dead processes left; return how many."""
    return _remove_stale(folder.rglob(f"{TEMPORARY}*"), older_than_s)


def _remove_stale(entries: Iterable[Path], older_than_s: float) -> int:
    count = 0
    horizon = time.time() - older_than_s
    for entry in entries:
        # Somebody removed it meanwhile, or it is another user's.
        with contextlib.suppress(OSError):
            if entry.lstat().st_mtime < horizon:
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry, ignore_errors=True)
                else:
                    entry.unlink()
                count += 1
    return count


@contextlib.contextmanager
def _temporary_file(
    path: Path, chunks: Iterable[bytes | memoryview], mode: int
) -> Iterator[str]:
    descriptor, temporary = tempfile.mkstemp(prefix=TEMPORARY, dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            for chunk in chunks:
                stream.write(chunk)
            stream.flush()
            os.fchmod(stream.fileno(), mode)
            os.fsync(stream.fileno())
        yield temporary
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _flush(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def _flush_folder(path: Path) -> None:
    # A rename is durable once the folder that holds the name is. Windows has no such call.
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def _errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        named = Path(os.fsdecode(error.filename)) if error.filename else path
        raise StoreError(
            f"cannot be written: {error.strerror or error}",
            # The name the user knows, not the one only we know.
            where=str(path if named.name.startswith(TEMPORARY) else named),
            hint="check free space and permissions; nothing was half written",
        ) from error
