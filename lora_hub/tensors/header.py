"""The header of a safetensors file: bytes ↔ `Header`, strictly.

    8 bytes      N, little endian
    N bytes      a JSON object: name → {"dtype", "shape", "data_offsets"}, and
                 "__metadata__" → {text: text}; padded with spaces
    the rest     the tensors' bytes; offsets count from here

Stricter than the safetensors library 0.8.0, which takes duplicate names (the last wins),
white space before the brace, unknown fields and any name: two readers that understand one
header differently are how a checked file turns into another one when it is used. So each
tensor stands once, the tensors cover the data without holes or overlap in the order of
their offsets, and nothing else is in the file.

Reading the tensors' bytes is the matter of `file.py`, writing them of `write.py`.

Source: https://github.com/huggingface/safetensors/blob/v0.8.0/README.md, "Format".
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter, itemgetter
from typing import Any

import msgspec

from lora_hub import strict_json
from lora_hub.errors import DocumentError, TensorFileError
from lora_hub.recent import MAX_KEY_BYTES, Recent
from lora_hub.tensors.dtypes import BITS
from lora_hub.tensors.foreign import refuse_foreign

METADATA = "__metadata__"
LENGTH_BYTES = 8
# Tensors begin at a multiple of this, as the safetensors library writes them.
ALIGNMENT_BYTES = 8

MAX_ELEMENTS = 1 << 40  # 2 TiB in bf16; products stay far from 64 bits
MAX_DIMENSIONS = 64  # what numpy and torch can hold
MAX_NAME_CHARACTERS = 1024

_TOO_LARGE = 1 << 63
_FIELDS = frozenset({"dtype", "shape", "data_offsets"})
_parts = itemgetter("dtype", "shape", "data_offsets")


@dataclass(frozen=True, slots=True)
class Limits:
    """How large a header may be before it is read at all."""

    header_bytes: int
    tensors: int


# 80 layers with seven targets have 200 kB; factors for each expert of Qwen3-30B-A3B by
# itself, 36,864 tensors, 6 MB.
ADAPTER_LIMITS = Limits(header_bytes=8 << 20, tensors=50_000)
CHECKPOINT_LIMITS = Limits(header_bytes=100_000_000, tensors=1_000_000)


# No dataclass: a header has hundreds of them, and this is made in an eighth of the time.
class TensorInfo(msgspec.Struct, frozen=True, gc=False):
    """One tensor of a file; `begin` and `end` count bytes from the data's start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def size_bytes(self) -> int:
        return self.end - self.begin

    @property
    def elements(self) -> int:
        return _product(self.shape)


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says about itself.

    Attributes:
        tensors: name → tensor, in the order of their bytes in the file.
        metadata: free text the writer left, e.g. {"format": "pt"}.
        data_start: offset in the file where the tensors' bytes begin.
        file_size: bytes of the whole file; the tensors end exactly there.
    """

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    data_start: int
    file_size: int


_RECENT: Recent[Header] = Recent()


def header_end(
    head: bytes | memoryview, file_size: int, *, where: str, limits: Limits = ADAPTER_LIMITS
) -> int:
    """Return where the header ends and the data begins.

    `head` is the beginning of the file, 8 bytes or more. Nothing has been allocated for
    the header yet, so a length out of all reason costs nothing.

    Raises:
        TensorFileError: the file is too short, the length is beyond the limit or the
            file's end, or the bytes are those of another format.
    """
    if file_size < LENGTH_BYTES or len(head) < LENGTH_BYTES:
        raise TensorFileError(
            f"the file has {file_size} bytes, a safetensors file has at least 10",
            where=where,
            hint="the download or copy was cut off; fetch the file again",
        )
    length = int.from_bytes(head[:LENGTH_BYTES], "little")
    # Not before the length is out of all reason: that of 640 bytes begins with 80 02.
    if length > CHECKPOINT_LIMITS.header_bytes:
        refuse_foreign(head, where)
    if length > file_size - LENGTH_BYTES:
        raise TensorFileError(
            f"the header claims {length} bytes, the file has {file_size} in all",
            where=where,
            hint="the file is cut off, or it is no safetensors file",
        )
    if length > limits.header_bytes:
        raise TensorFileError(
            f"the header has {length} bytes, at most {limits.header_bytes} are read",
            where=where,
        )
    return LENGTH_BYTES + length


def parse_header(
    head: bytes | memoryview, file_size: int, *, where: str, limits: Limits = ADAPTER_LIMITS
) -> Header:
    """Return the header of a file of `file_size` bytes that begins with `head`.

    `head` reaches to `header_end` at least; what lies behind that is not looked at.

    Raises:
        TensorFileError: anything at all is not as the format says, see above.
    """
    data_start = header_end(head, file_size, where=where, limits=limits)
    text = bytes(head[LENGTH_BYTES:data_start])
    key = (text, file_size, limits)
    header = _RECENT.get(key)
    if header is None:
        header = _parsed(text, data_start, file_size, where=where, limits=limits)
        if len(text) <= MAX_KEY_BYTES:
            _RECENT.keep(key, header)
    return header


def _parsed(
    text: bytes, data_start: int, file_size: int, *, where: str, limits: Limits
) -> Header:
    if not text.startswith(b"{"):
        raise TensorFileError("the header does not begin with '{'", where=where)
    if not text.rstrip(b" ").endswith(b"}"):
        raise TensorFileError("the header does not end with '}' and spaces", where=where)
    value = _json_object(text, where, limits)
    metadata = _metadata(value.pop(METADATA, {}), where)
    if len(value) > limits.tensors:
        raise TensorFileError(
            f"the header names {len(value)} tensors, at most {limits.tensors} are read",
            where=where,
        )
    tensors = _tensors(value, where)
    tensors.sort(key=attrgetter("begin", "end"))
    _check_coverage(tensors, data_start, file_size, where)
    return Header({info.name: info for info in tensors}, metadata, data_start, file_size)


def encode_header(
    tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, Header]:
    """Return the header bytes, length included, and the header they spell.

    Tensors (name, dtype, shape) lie in the given order without gaps. The spelling is that
    of the safetensors library: compact JSON, metadata first, spaces up to 8 bytes.

    Raises:
        TensorFileError: a name stands twice or could not be read back.
    """
    value: dict[str, Any] = {METADATA: dict(sorted(metadata.items()))} if metadata else {}
    begin = 0
    for name, dtype, shape in tensors:
        if name in value:
            raise TensorFileError("the tensor is written twice", where=_shown(name))
        numbers = _numbers(list(shape), "shape", _shown(name))
        end = begin + _size_bytes(dtype, shape, _shown(name))
        value[name] = {"dtype": dtype, "shape": numbers, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT_BYTES)
    head = len(text).to_bytes(LENGTH_BYTES, "little") + text
    # Read it back: what we write is never what we would refuse.
    header = parse_header(
        head, len(head) + begin, where="new header", limits=CHECKPOINT_LIMITS
    )
    return head, header


def _json_object(text: bytes, where: str, limits: Limits) -> dict[str, Any]:
    try:
        return strict_json.decode_object(text, where=where, max_bytes=limits.header_bytes)
    except DocumentError as error:
        raise TensorFileError(
            f"the header is malformed: {error.problem}", where=where, hint=error.hint
        ) from error


def _metadata(value: Any, where: str) -> dict[str, str]:
    # MLX writes null where it has nothing to say, and so does every adapter made with it.
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise TensorFileError(
            f"{METADATA} is {_kind(value)}, expected an object of texts", where=where
        )
    for key, item in value.items():
        if not isinstance(item, str):
            raise TensorFileError(
                f"{METADATA} entry {_shown(key)} is {_kind(item)}, expected a text",
                where=where,
            )
    return value


def _tensors(entries: Mapping[str, Any], where: str) -> list[TensorInfo]:
    """Return what the entries of a header say, in their order.

    A file has many tensors of few shapes: a shape that was looked at is known by its
    numbers and their types (True == 1 == 1.0), and nothing of it is looked at again.
    """
    known: dict[tuple[Any, ...], tuple[tuple[int, ...], int]] = {}
    found = []
    for name, entry in entries.items():
        try:
            dtype, shape, (begin, end) = _parts(entry)
            key = (dtype, *shape, *map(type, shape))
            numbers, size_bytes = known[key]
            is_known = (
                type(begin) is type(end) is int
                and 0 <= begin <= end < _TOO_LARGE
                and end - begin == size_bytes
                and len(entry) == len(_FIELDS)
                and 0 < len(name) <= MAX_NAME_CHARACTERS
                and name.isprintable()
            )
        except (KeyError, TypeError, ValueError):
            is_known = False
        if is_known:
            found.append(TensorInfo(name, dtype, numbers, begin, end))
            continue
        info = _tensor(name, entry, where)
        known[(info.dtype, *info.shape, *map(type, info.shape))] = (
            info.shape,
            info.size_bytes,
        )
        found.append(info)
    return found


def _tensor(name: str, entry: Any, where: str) -> TensorInfo:
    at = f"{where}: {_shown(name)}"
    _check_name(name, at)
    if not isinstance(entry, dict):
        raise TensorFileError(f"the entry is {_kind(entry)}, expected an object", where=at)
    for field in sorted(entry.keys() - _FIELDS):
        raise TensorFileError(f"the field {_shown(field)} is unknown", where=at)
    for field in sorted(_FIELDS - entry.keys()):
        raise TensorFileError(f"the field {_shown(field)} is missing", where=at)
    dtype = entry["dtype"]
    shape = tuple(_numbers(entry["shape"], "shape", at))
    if len(shape) > MAX_DIMENSIONS:
        raise TensorFileError(
            f"the shape has {len(shape)} dimensions, at most {MAX_DIMENSIONS} are read",
            where=at,
        )
    offsets = _numbers(entry["data_offsets"], "data_offsets", at)
    if len(offsets) != 2:
        raise TensorFileError(
            f"data_offsets has {len(offsets)} numbers, expected begin and end", where=at
        )
    begin, end = offsets
    if begin > end:
        raise TensorFileError(f"the tensor begins at {begin} and ends at {end}", where=at)
    size_bytes = _size_bytes(dtype, shape, at)
    if end - begin != size_bytes:
        raise TensorFileError(
            f"the offsets span {end - begin} bytes, {dtype} of shape {list(shape)} "
            f"takes {size_bytes}",
            where=at,
        )
    return TensorInfo(name, dtype, shape, begin, end)


def _check_name(name: str, at: str) -> None:
    if not name:
        raise TensorFileError("a tensor's name is empty", where=at)
    if len(name) > MAX_NAME_CHARACTERS:
        raise TensorFileError(
            f"the name has {len(name)} characters, at most {MAX_NAME_CHARACTERS} are read",
            where=at,
        )
    # Control characters, bidirectional overrides, zero-width marks and lone surrogates
    # are all "not printable" to Unicode: what a person reads is what the name is.
    if not name.isprintable():
        raise TensorFileError("the name holds characters that cannot be seen", where=at)


def _numbers(value: Any, field: str, at: str) -> list[int]:
    if not isinstance(value, list):
        raise TensorFileError(f"{field} is {_kind(value)}, expected a list", where=at)
    for number in value:
        if type(number) is not int or number < 0:  # bool is an int to isinstance
            raise TensorFileError(
                f"{field} holds {json.dumps(number)[:40]}, expected whole numbers from 0",
                where=at,
            )
        if number >= _TOO_LARGE:
            raise TensorFileError(f"{field} holds a number of 2**63 or more", where=at)
    return value


def _size_bytes(dtype: Any, shape: tuple[int, ...], at: str) -> int:
    if not isinstance(dtype, str) or dtype not in BITS:
        raise TensorFileError(f"the dtype {json.dumps(dtype)[:40]} is unknown", where=at)
    # Over the non-zero dimensions, so that a zero hides no overflow.
    if _product(tuple(n for n in shape if n)) > MAX_ELEMENTS:
        raise TensorFileError(
            f"the shape {_brief(shape)} has more than 2**40 elements", where=at
        )
    size_bytes, odd_bits = divmod(_product(shape) * BITS[dtype], 8)
    if odd_bits:
        raise TensorFileError(
            f"{dtype} of shape {list(shape)} does not fill whole bytes", where=at
        )
    return size_bytes


def _check_coverage(
    tensors: Sequence[TensorInfo], data_start: int, file_size: int, where: str
) -> None:
    covered = 0
    for info in tensors:
        if info.begin != covered:
            what = (
                "overlaps the tensor before it" if info.begin < covered else "leaves a hole"
            )
            raise TensorFileError(
                f"the tensor {what}: it begins at {info.begin}, expected {covered}",
                where=f"{where}: {_shown(info.name)}",
            )
        covered = info.end
    found = file_size - data_start
    if found < covered:
        raise TensorFileError(
            f"the tensors need {covered} bytes, {found} follow the header",
            where=where,
            hint="the download or copy was cut off; fetch the file again",
        )
    if found > covered:
        raise TensorFileError(
            f"{found - covered} bytes follow the last tensor, expected none",
            where=where,
            hint="something was appended to the file; do not use it",
        )


def _product(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


_KINDS: Mapping[type, str] = {
    dict: "an object",
    list: "a list",
    str: "a text",
    bool: "a boolean",
    type(None): "null",
}


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), "a number")


def _shown(name: str) -> str:
    return ascii(name if len(name) <= 80 else name[:77] + "...")


def _brief(shape: tuple[int, ...]) -> str:
    text = str(list(shape))
    return text if len(text) <= 80 else text[:77] + "..."
