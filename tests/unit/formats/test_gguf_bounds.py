"""Counts and lengths that the gguf package would believe, for ever."""

import struct

import pytest

from lora_hub.errors import FormatError
from lora_hub.formats.gguf_bounds import check_bounds
from tests import adapters
from tests.adapters import Q0, part, source

HUGE = 1 << 62


def file(*pieces, version=3, tensors=0, fields=0):
    return b"GGUF" + struct.pack("<IQQ", version, tensors, fields) + b"".join(pieces)


def text(value):
    return struct.pack("<Q", len(value)) + value


BAD = {
    "too short": (b"GGUF\x03", "ends too early"),
    "another version": (file(version=1), "its version is 1"),
    "big endian": (file(version=3 << 24), "its version is"),
    "more fields than are read": (file(fields=HUGE), "fields and 0 tensors"),
    "more tensors than are read": (file(tensors=HUGE), "at most 1000 and 50000"),
    "a name without end": (file(struct.pack("<Q", HUGE), fields=1), "beyond its end"),
    "more fields than bytes": (file(fields=9), "ends too early"),
    "more tensors than bytes": (file(tensors=9), "ends too early"),
    "a list beyond the end": (
        file(text(b"k"), struct.pack("<IIQ", 9, 0, 9), fields=1),
        "beyond its end",
    ),
    "a list of texts beyond the end": (
        file(text(b"k"), struct.pack("<IIQ", 9, 8, 9), fields=1),
        "ends too early",
    ),
    "a list without end": (
        file(text(b"k"), struct.pack("<IIQ", 9, 0, HUGE), fields=1),
        "more than 50000 values",
    ),
    "a vocabulary": (
        file(text(b"k"), struct.pack("<IIQ", 9, 8, 60_000), bytes(480_000), fields=1),
        "a model brings its vocabulary",
    ),
    "many short lists": (
        file(*(text(b"k") + struct.pack("<IIQ", 9, 0, 99) + bytes(99),) * 600, fields=600),
        "more than 50000 values",
    ),
    "a list of lists": (
        file(text(b"k"), struct.pack("<IIQ", 9, 9, 1), fields=1),
        "a value has the type 9",
    ),
    "an unknown type": (file(text(b"k"), struct.pack("<I", 99), fields=1), "the type 99"),
    "many dimensions": (
        file(text(b"t"), struct.pack("<I", 99), tensors=1),
        "99 dimensions",
    ),
    "a huge tensor": (
        file(text(b"t"), struct.pack("<IQQ", 2, 1 << 32, 1 << 32), tensors=1),
        "2**40 elements",
    ),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.timeout(5)
def test_what_reaches_beyond_the_file_is_refused(case):
    data, problem = BAD[case]

    with pytest.raises(FormatError) as error:
        check_bounds(data, "x.gguf")

    assert problem in error.value.problem


def test_adapter_stays_within_its_file(tmp_path):
    base = adapters.language_base(tmp_path)

    check_bounds(adapters.written("gguf", source(part(Q0)), base)["adapter.gguf"], "x")
