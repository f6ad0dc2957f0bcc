"""A store in memory: for tests, and the shortest description of what a store does."""

import threading
from collections.abc import Iterable, Iterator

from lora_hub.errors import IntegrityError, NotFoundError
from lora_hub.registry.stores.protocol import Stat, check_path


class MemoryStore:
    """Keeps files in a dictionary; may be shared by threads."""

    def __init__(self) -> None:
        self.where = "memory"
        self._files: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def read(self, path: str, *, max_bytes: int | None = None) -> bytes:
        check_path(path)
        if path not in self._files:
            raise NotFoundError("there is no such file", where=path)
        data = self._files[path]
        if max_bytes is not None and len(data) > max_bytes:
            raise IntegrityError(
                f"the file has {len(data)} bytes, at most {max_bytes} are read", where=path
            )
        return data

    def chunks(self, path: str) -> Iterator[bytes]:
        yield self.read(path)

    def write(
        self, path: str, chunks: Iterable[bytes | memoryview], *, if_absent: bool
    ) -> bool:
        check_path(path)
        data = b"".join(chunks)
        with self._lock:
            if if_absent and path in self._files:
                return False
            self._files[path] = data
            return True

    def stat(self, path: str) -> Stat | None:
        check_path(path)
        data = self._files.get(path)
        return None if data is None else Stat(len(data))

    def list(self, prefix: str) -> Iterator[str]:
        folder = f"{prefix}/" if prefix else ""
        with self._lock:
            paths = sorted(path for path in self._files if path.startswith(folder))
        yield from paths

    def delete(self, path: str) -> None:
        check_path(path)
        with self._lock:
            self._files.pop(path, None)
