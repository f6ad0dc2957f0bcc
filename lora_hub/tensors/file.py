"""A safetensors file opened for reading: its header, and any range of any tensor.

Two makers. `from_bytes` is for adapters: the bytes that were hashed are the bytes that are
used. `open` is for checkpoints: it reads ranges as they are asked for and never maps the
file, so a file that is cut off while we read is an error and not a SIGBUS. Both may be
read from several threads.
"""

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, Self

from lora_hub.errors import InputError, TensorFileError
from lora_hub.tensors.header import (
    ADAPTER_LIMITS,
    CHECKPOINT_LIMITS,
    LENGTH_BYTES,
    Header,
    Limits,
    TensorInfo,
    header_end,
    parse_header,
)

CHUNK_BYTES = 1 << 20  # as in digest.py: fits the second-level cache

# (device, inode, size in bytes, mtime in ns): as long as these stay, the bytes do.
Identity = tuple[int, int, int, int]


class _Bytes(Protocol):
    """Where the bytes come from; offsets count from the start of the file."""

    def read(self, begin: int, end: int) -> memoryview: ...
    def read_into(self, begin: int, buffer: memoryview) -> None: ...
    def close(self) -> None: ...


class TensorFile:
    """A header and the bytes it describes.

    Attributes:
        header: the file's strict header.
        where: what to call the file in messages.
        identity: of the file on disk; None when the bytes were given in memory.
        was_read: whether anybody has asked for bytes of the tensors.
    """

    __slots__ = ("_bytes", "header", "identity", "was_read", "where")

    def __init__(
        self, header: Header, data: _Bytes, *, where: str, identity: Identity | None = None
    ) -> None:
        self.header = header
        self.where = where
        self.identity = identity
        self.was_read = False
        self._bytes = data

    @classmethod
    def from_bytes(
        cls,
        data: bytes | bytearray | memoryview,
        *,
        where: str,
        limits: Limits = ADAPTER_LIMITS,
    ) -> Self:
        """Return the file whose whole content is `data`; nothing is copied.

        Raises:
            TensorFileError: the header is not as the format says.
        """
        view = memoryview(data).cast("B").toreadonly()
        header = parse_header(view, view.nbytes, where=where, limits=limits)
        return cls(header, _Memory(view), where=where)

    @classmethod
    def open(cls, path: Path, *, limits: Limits = CHECKPOINT_LIMITS) -> Self:
        """Return the file at `path`; close it, or use it in a `with` block.

        Symbolic links are followed, since the caches that hold bases are made of them.

        Raises:
            InputError: it cannot be opened or is no regular file.
            TensorFileError: the header is not as the format says.
        """
        where = str(path)
        try:
            # Without O_NONBLOCK, opening a named pipe would wait for its writer.
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise InputError(f"cannot be opened: {error.strerror}", where=where) from error
        data = _Descriptor(descriptor, where)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise InputError("is no regular file", where=where)
            size = status.st_size
            head = data.read(0, min(LENGTH_BYTES, size))
            head = data.read(0, header_end(head, size, where=where, limits=limits))
            header = parse_header(head, size, where=where, limits=limits)
        except BaseException:
            data.close()
            raise
        identity = (status.st_dev, status.st_ino, size, status.st_mtime_ns)
        return cls(header, data, where=where, identity=identity)

    def info(self, name: str) -> TensorInfo:
        """Return the tensor of this name.

        Raises:
            TensorFileError: the file has none.
        """
        try:
            return self.header.tensors[name]
        except KeyError:
            raise TensorFileError(f"holds no tensor {name!r}", where=self.where) from None

    def read(self, name: str, start: int = 0, stop: int | None = None) -> memoryview:
        """Return bytes `start` to `stop` of a tensor, all of them by default.

        The view is read-only and must not outlive a file given by `from_bytes` being
        changed; row-major, little endian.

        Raises:
            TensorFileError: there is no such tensor or range, or the file became shorter.
            InputError: the disk refuses.
        """
        begin, end = self._range(name, start, stop)
        self.was_read = True
        return self._bytes.read(begin, end)

    def whole(self) -> memoryview:
        """Return the bytes of all tensors; `begin` and `end` of each count from its start.

        Nothing is copied of a file given by `from_bytes`. Errors as `read`.
        """
        self.was_read = True
        return self._bytes.read(self.header.data_start, self.header.file_size)

    def read_into(self, name: str, start: int, buffer: bytearray | memoryview) -> None:
        """Fill the buffer with a tensor's bytes from `start` on; errors as `read`."""
        view = memoryview(buffer).cast("B")
        begin, _ = self._range(name, start, start + view.nbytes)
        self.was_read = True
        self._bytes.read_into(begin, view)

    def chunks(self, name: str, chunk_bytes: int = CHUNK_BYTES) -> Iterator[memoryview]:
        """Give a tensor's bytes in pieces; each is valid until the next is asked for."""
        size = self.info(name).size_bytes
        buffer = memoryview(bytearray(min(chunk_bytes, size)))
        for start in range(0, size, chunk_bytes):
            piece = buffer[: min(chunk_bytes, size - start)]
            self.read_into(name, start, piece)
            yield piece

    def close(self) -> None:
        """Give the file back; closing twice is fine."""
        self._bytes.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _range(self, name: str, start: int, stop: int | None) -> tuple[int, int]:
        info = self.info(name)
        stop = info.size_bytes if stop is None else stop
        if not 0 <= start <= stop <= info.size_bytes:
            raise TensorFileError(
                f"bytes {start} to {stop} of {name!r} were asked for, it has "
                f"{info.size_bytes}",
                where=self.where,
            )
        offset = self.header.data_start + info.begin
        return offset + start, offset + stop


class _Memory:
    __slots__ = ("_view",)

    def __init__(self, view: memoryview) -> None:
        self._view = view

    def read(self, begin: int, end: int) -> memoryview:
        return self._view[begin:end]

    def read_into(self, begin: int, buffer: memoryview) -> None:
        buffer[:] = self._view[begin : begin + buffer.nbytes]

    def close(self) -> None:
        pass


class _Descriptor:
    __slots__ = ("_descriptor", "_where")

    def __init__(self, descriptor: int, where: str) -> None:
        self._descriptor = descriptor
        self._where = where

    def read(self, begin: int, end: int) -> memoryview:
        buffer = memoryview(bytearray(end - begin))
        self.read_into(begin, buffer)
        return buffer.toreadonly()

    def read_into(self, begin: int, buffer: memoryview) -> None:
        # One call gives at most 2 GiB on Linux, and may always give less than asked.
        try:
            while buffer.nbytes:
                count = os.preadv(self._descriptor, [buffer], begin)
                if count == 0:
                    raise TensorFileError(
                        "the file became shorter while it was read", where=self._where
                    )
                buffer = buffer[count:]
                begin += count
        except OSError as error:
            raise InputError(
                f"cannot be read: {error.strerror}", where=self._where
            ) from error

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        self.close()
