"""Whether the counts and lengths in a GGUF file stay within it, before it is read.

The `gguf` package believes them: one false length of a list keeps it counting for ever.
What the fields mean is not looked at here.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, version 3.
"""

import struct

from lora_hub.errors import FormatError

_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
# value type → bytes
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}

_MAX_DIMENSIONS = 4  # of ggml
# The most that lie before the tensors' data. An adapter has some ten fields and no
# vocabulary, whose lists the `gguf` package takes apart one by one.
MAX_FIELDS, MAX_LISTED, MAX_TENSORS = 1000, 50_000, 50_000

# More elements than any tensor has, and products of them stay far from 64 bits.
_MAX_ELEMENTS = 1 << 40


def check_bounds(data: bytes, where: str) -> None:
    """Raise `FormatError` unless everything that the file counts lies within it."""
    try:
        _Walk(data).check()
    except ValueError as error:
        raise FormatError(
            f"is no GGUF file that can be read: {error}",
            where=where,
            hint="the download or copy was cut off, or the file is of another version",
        ) from error


class _Walk:
    """A position in the file; every step is checked against its end."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 4  # behind the magic
        self.listed = 0

    def check(self) -> None:
        """Raise `ValueError` at the first count that reaches beyond the file."""
        version = self.number("<I")
        if version not in _VERSIONS:
            raise ValueError(f"its version is {version}, expected one of {_VERSIONS}")
        tensors, fields = self.number("<Q"), self.number("<Q")
        if fields > MAX_FIELDS or tensors > MAX_TENSORS:
            raise ValueError(
                f"it claims {fields} fields and {tensors} tensors; of an adapter at most "
                f"{MAX_FIELDS} and {MAX_TENSORS} are read"
            )
        for _ in range(fields):
            self.string()
            self.value(self.number("<I"))
        for _ in range(tensors):
            self.tensor()

    def tensor(self) -> None:
        self.string()
        dimensions = self.number("<I")
        if dimensions > _MAX_DIMENSIONS:
            raise ValueError(f"a tensor has {dimensions} dimensions")
        elements = 1
        for _ in range(dimensions):
            elements *= self.number("<Q")
        if elements > _MAX_ELEMENTS:
            raise ValueError("a tensor has more than 2**40 elements")
        self.skip(4 + 8)  # its type and offset

    def value(self, kind: int) -> None:
        if kind == _STRING:
            self.string()
        elif kind != _ARRAY:
            self.skip(self.size(kind))
        else:
            inner, count = self.number("<I"), self.number("<Q")
            self.listed += count
            if self.listed > MAX_LISTED:
                raise ValueError(
                    f"its lists hold more than {MAX_LISTED} values: a model brings its "
                    "vocabulary, an adapter none"
                )
            if inner == _STRING:
                for _ in range(count):
                    self.string()
            else:
                self.skip(self.size(inner) * count)

    def size(self, kind: int) -> int:
        # Lists of lists are in no adapter.
        if kind not in _SIZES:
            raise ValueError(f"a value has the type {kind}")
        return _SIZES[kind]

    def string(self) -> None:
        self.skip(self.number("<Q"))

    def number(self, form: str) -> int:
        if self.at + struct.calcsize(form) > len(self.data):
            raise ValueError("it ends too early")
        (value,) = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return int(value)

    def skip(self, count: int) -> None:
        self.at += count
        if self.at > len(self.data):
            raise ValueError("a length reaches beyond its end")
