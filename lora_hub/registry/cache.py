"""Pulled packages by their digest: folders that are whole or not there.

    <cache>/packages/<64 hex>/      the files of one package, read-only

A folder gets its name when all its files are on the disk, so a process killed at any
moment leaves nothing that is read. The name is the package digest, so any number of
processes may pull the same package at once. No links, no lock files.
"""

import contextlib
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lora_hub import atomic, digest, settings
from lora_hub.errors import IntegrityError, StoreError, TrustError
from lora_hub.package.package import open_package
from lora_hub.registry.problem import Problem, noted
from lora_hub.registry.verify import digests_of

UNUSED_S = 30 * 24 * 3600


@dataclass(frozen=True, slots=True)
class Cached:
    """One package in the cache."""

    package: str
    folder: Path
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Pruned:
    """What was removed."""

    packages: int
    size_bytes: int


class Cache:
    """Packages below a folder; by default the user's (`LORAHUB_CACHE`)."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = (folder or settings.cache_folder()) / "packages"

    def get(self, package: str) -> Path | None:
        """Return the folder of the package with this digest, None where it is not kept.

        Raises:
            TrustError: others may write to the cache.
        """
        place = self._place(package)
        with _errors("read", self.folder):
            if not place.is_dir():
                return None
            self._check_private()
        with contextlib.suppress(OSError):
            os.utime(place)  # when it was last used, for `prune`
        return place

    def put(self, package: str, files: Iterable[tuple[str, bytes]]) -> Path:
        """Keep a package's files, already compared with their digests; return the folder.

        Raises:
            TrustError: others may write to the cache.
            StoreError: it cannot be written.
        """
        place = self._place(package)
        self._make()
        try:
            with atomic.new_folder(place) as folder:
                for name, data in files:
                    _write(folder / name, data)
        except StoreError:
            # Another process may have put the same package meanwhile.
            if not place.is_dir():
                raise
        return place

    def list(self) -> tuple[Cached, ...]:
        """Return what is kept, in order of digests."""
        found = []
        with _errors("read", self.folder):
            for place in sorted(self.folder.glob("*")):
                package = f"sha256:{place.name}"
                if digest.is_digest(package) and place.is_dir():
                    # Another process may prune it meanwhile.
                    with contextlib.suppress(FileNotFoundError):
                        found.append(Cached(package, place, _size(place)))
        return tuple(found)

    def verify(self) -> tuple[Problem, ...]:
        """Return what is wrong with the packages kept; every byte is read."""
        problems: list[Problem] = []
        for cached in self.list():
            with noted(problems, str(cached.folder)):
                _verify(cached)
        return tuple(problems)

    def prune(self, *, unused_s: float = UNUSED_S) -> Pruned:
        """Remove what is long unused, damaged, or was left by a dead process."""
        horizon = time.time() - unused_s
        removed = Pruned(0, 0)
        for cached in self.list():
            problems: list[Problem] = []
            with noted(problems, str(cached.folder)):
                _verify(cached)
            # Another process may prune the same package.
            with _errors("removed", cached.folder), contextlib.suppress(FileNotFoundError):
                if problems or cached.folder.stat().st_mtime <= horizon:
                    self._remove(cached.folder)
                    removed = Pruned(
                        removed.packages + 1, removed.size_bytes + cached.size_bytes
                    )
        if self.folder.is_dir():
            atomic.sweep(self.folder)
        return removed

    def _place(self, package: str) -> Path:
        return self.folder / digest.hex_of(package)

    def _make(self) -> None:
        with _errors("written", self.folder):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._check_private()

    def _check_private(self) -> None:
        # Whoever may write here could exchange a file between its check and its use.
        mode = self.folder.stat().st_mode
        if os.name == "posix" and mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise TrustError(
                "others may write to the cache",
                where=str(self.folder),
                hint=f"chmod go-w {self.folder}",
            )

    def _remove(self, place: Path) -> None:
        # Out of sight in one step; who has a file open keeps it.
        grave = tempfile.mkdtemp(prefix=atomic.TEMPORARY, dir=self.folder)
        try:
            place.rename(Path(grave, place.name))
        finally:
            shutil.rmtree(grave, ignore_errors=True)


def _verify(cached: Cached) -> None:
    package = open_package(cached.folder)
    if package.digest != cached.package:
        raise IntegrityError(
            f"the manifest has digest {package.digest}, the folder is named by another",
            where=str(cached.folder),
            hint="remove it with `lorahub cache prune` and pull again",
        )
    digests_of(package)


def _write(path: Path, data: bytes) -> None:
    with _errors("written", path):
        path.write_bytes(data)
        path.chmod(0o444)


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.iterdir())


@contextlib.contextmanager
def _errors(verb: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"cannot be {verb}: {error.strerror or error}",
            where=str(error.filename or path),
            hint="check free space and permissions, or set LORAHUB_CACHE to another folder",
        ) from error
