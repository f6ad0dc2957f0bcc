"""The strict header: a table of what must be refused, and the library as the oracle."""

import json

import pytest
import safetensors
import torch
from safetensors.torch import load, save

from lora_hub.errors import TensorFileError
from lora_hub.tensors.dtypes import BITS, is_float
from lora_hub.tensors.header import (
    ADAPTER_LIMITS,
    CHECKPOINT_LIMITS,
    Limits,
    encode_header,
    header_end,
    parse_header,
)


def raw(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    """Return a file with this header, a value or the text itself."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if length is None else length
    return length.to_bytes(8, "little") + text + data


def one(**changes: object) -> dict:
    """Return the header of one F32 tensor of two elements, fields changed."""
    return {"t": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}


def two(first: list[int], second: list[int]) -> dict:
    return {
        name: {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}
        for name, (begin, end) in (("a", first), ("b", second))
    }


def without(field: str) -> dict:
    header = one()
    del header["t"][field]
    return header


ENTRY = json.dumps(one()["t"]).encode()
BYTES = bytes(8)
HUGE = (1 << 63).to_bytes(8, "little")

MALFORMED = {
    "empty file": (b"", "the file has 0 bytes"),
    "seven bytes": (b"\x01" * 7, "the file has 7 bytes"),
    "length beyond the file": (raw({}, length=100), "the header claims 100 bytes"),
    "length of 2**63": (HUGE + b"{}", "the header claims 9223372036854775808 bytes"),
    "length of 2**64 - 1": (b"\xff" * 8 + b"{}", "the header claims 18446744073709551615"),
    "length beyond the limit": (
        raw(b"{" + b" " * (8 << 20) + b"}"),
        "at most 8388608 are read",
    ),
    "length zero": (raw(b""), "does not begin with '{'"),
    "cut off inside the header": (raw(one(), BYTES)[:30], "the file has 30 in all"),
    "cut off inside the data": (raw(one(), BYTES[:5]), "need 8 bytes, 5 follow"),
    "bytes behind the data": (raw(one(), BYTES + b"#"), "1 bytes follow the last tensor"),
    "bytes behind nothing": (raw({}, b"payload"), "7 bytes follow the last tensor"),
    "space before the brace": (raw(b" {}"), "does not begin with '{'"),
    "byte order mark": (raw(b"\xef\xbb\xbf{}"), "does not begin with '{'"),
    "a list": (raw([]), "does not begin with '{'"),
    "line feed behind the brace": (raw(b"{}\n"), "does not end with '}' and spaces"),
    "zeros behind the brace": (raw(b"{}\0\0"), "does not end with '}' and spaces"),
    "two objects": (raw(b"{}{}"), "malformed: not JSON"),
    "not JSON": (raw(b"{t}"), "malformed: not JSON"),
    "comma at the end": (raw(b'{"t":' + ENTRY + b",}", BYTES), "malformed: not JSON"),
    "not UTF-8": (raw(b'{"\xff":' + ENTRY + b"}", BYTES), "is not UTF-8"),
    "nested forty deep": (raw(b'{"t":' * 40 + b"1" + b"}" * 40), "more than 32 levels"),
    "nested for ever": (raw(b'{"t":' + b"[" * 100_000 + b"}"), "more than 32 levels"),
    "a name twice": (
        raw(b'{"t":' + ENTRY + b',"t":' + ENTRY + b"}", BYTES),
        "the key 't' stands twice",
    ),
    "a name twice, spelt in two ways": (
        raw(b'{"t":' + ENTRY + rb',"\u0074":' + ENTRY + b"}", BYTES),
        "the key 't' stands twice",
    ),
    "a field twice": (
        raw(b'{"t":{"dtype":"F32","dtype":"F16","shape":[2],"data_offsets":[0,8]}}', BYTES),
        "the key 'dtype' stands twice",
    ),
    "metadata twice": (
        raw(b'{"__metadata__":{},"__metadata__":{}}'),
        "the key '__metadata__' stands twice",
    ),
    "a metadata key twice": (
        raw(b'{"__metadata__":{"a":"1","a":"2"}}'),
        "the key 'a' stands twice",
    ),
    "metadata a text": (raw({"__metadata__": "pt"}), "__metadata__ is a text"),
    "metadata with a number": (raw({"__metadata__": {"a": 1}}), "entry 'a' is a number"),
    "metadata nested": (raw({"__metadata__": {"a": {}}}), "entry 'a' is an object"),
    "entry null": (raw({"t": None}), "the entry is null"),
    "entry a list": (raw({"t": ["F32", [2], [0, 8]]}, BYTES), "the entry is a list"),
    "unknown field": (raw(one(strides=[1]), BYTES), "the field 'strides' is unknown"),
    "no dtype": (raw(without("dtype"), BYTES), "the field 'dtype' is missing"),
    "no shape": (raw(without("shape"), BYTES), "the field 'shape' is missing"),
    "no offsets": (raw(without("data_offsets"), BYTES), "'data_offsets' is missing"),
    "unknown dtype": (raw(one(dtype="F128"), BYTES), 'the dtype "F128" is unknown'),
    "dtype in lower case": (raw(one(dtype="f32"), BYTES), 'the dtype "f32" is unknown'),
    "dtype a number": (raw(one(dtype=7), BYTES), "the dtype 7 is unknown"),
    "dtype a list": (raw(one(dtype=["F32"]), BYTES), 'the dtype ["F32"] is unknown'),
    "shape a number": (raw(one(shape=2), BYTES), "shape is a number, expected a list"),
    "shape a text": (raw(one(shape="2"), BYTES), "shape is a text, expected a list"),
    "negative dimension": (raw(one(shape=[-2]), BYTES), "shape holds -2"),
    "dimension with a point": (raw(one(shape=[2.0]), BYTES), "shape holds 2.0"),
    "dimension true": (raw(one(shape=[2, True]), BYTES), "shape holds true"),
    "dimension a text": (raw(one(shape=["2"]), BYTES), 'shape holds "2"'),
    "dimension NaN": (raw(b'{"t":{"shape":[NaN]}}'), "NaN is no JSON number"),
    "dimension of 5000 digits": (
        raw(b'{"t":{"shape":[' + b"9" * 5000 + b"]}}"),
        "malformed: not JSON",
    ),
    "product of 2**64": (raw(one(shape=[1 << 32, 1 << 32])), "more than 2**40 elements"),
    "product of 2**64, hidden by a zero": (
        raw(one(shape=[1 << 32, 1 << 32, 0], data_offsets=[0, 0])),
        "more than 2**40 elements",
    ),
    "sixty-five dimensions": (raw(one(shape=[1] * 65), BYTES), "has 65 dimensions"),
    "one offset": (raw(one(data_offsets=[0]), BYTES), "data_offsets has 1 numbers"),
    "three offsets": (raw(one(data_offsets=[0, 4, 8]), BYTES), "has 3 numbers"),
    "negative offset": (raw(one(data_offsets=[-8, 0]), BYTES), "data_offsets holds -8"),
    "begin behind end": (raw(one(data_offsets=[8, 0]), BYTES), "begins at 8 and ends at 0"),
    "span too small": (raw(one(data_offsets=[0, 7]), BYTES), "the offsets span 7 bytes"),
    "span too large": (raw(one(shape=[1]), BYTES), "the offsets span 8 bytes"),
    "offsets beyond the file": (
        raw(one(shape=[200], data_offsets=[0, 800]), BYTES),
        "need 800 bytes, 8 follow",
    ),
    "half a byte": (
        raw(one(dtype="F4", shape=[3], data_offsets=[0, 1]), b"\0"),
        "does not fill whole bytes",
    ),
    "hole at the start": (
        raw(one(data_offsets=[8, 16]), bytes(16)),
        "leaves a hole: it begins at 8, expected 0",
    ),
    "hole in the middle": (
        raw(two([0, 4], [6, 8]), BYTES),
        "leaves a hole: it begins at 6, expected 4",
    ),
    "an offset of 4000 digits": (
        raw(one(data_offsets=[10**4000, 10**4000 + 8]), BYTES),
        "data_offsets holds a number of 2**63 or more",
    ),
    "overlap": (raw(two([0, 4], [2, 8]), BYTES), "overlaps the tensor before it"),
    "one inside the other": (raw(two([0, 8], [2, 4]), BYTES), "overlaps the tensor"),
    "two on the same bytes": (raw(two([0, 8], [0, 8]), BYTES), "overlaps the tensor"),
    "empty name": (raw({"": one()["t"]}, BYTES), "a tensor's name is empty"),
    "name with a line feed": (raw({"t\n": one()["t"]}, BYTES), "cannot be seen"),
    "name with NUL": (raw({"t\0": one()["t"]}, BYTES), "cannot be seen"),
    "name that runs backwards": (raw({"t\u202e": one()["t"]}, BYTES), "cannot be seen"),
    "name with a zero-width space": (raw({"t\u200b": one()["t"]}, BYTES), "cannot be seen"),
    "name with half a surrogate": (
        raw({"t\ud800": one()["t"]}, BYTES),
        "half of a surrogate",
    ),
    "name of 2000 characters": (raw({"t" * 2000: one()["t"]}, BYTES), "2000 characters"),
    "torch.save": (b"PK\x03\x04\x14\x00\x08\x08" + bytes(80), "this is a zip archive"),
    "a pickle": (b"\x80\x02}q\x00(X\x05" + bytes(80), "this is a Python pickle"),
    "an LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        "this is a Git LFS pointer",
    ),
    "GGUF": (b"GGUF\x03\x00\x00\x00\x21\x01" + bytes(80), "this is a GGUF file"),
    "a web page": (b"<!DOCTYPE html><html>404</html>", "this is a web page"),
    "JSON": (b'{"error": "not found"}', "this is a JSON document"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_refuses_malformed_headers(name):
    data, message = MALFORMED[name]

    with pytest.raises(TensorFileError) as caught:
        parse_header(data, len(data), where="file")

    assert message in caught.value.problem
    assert caught.value.where is not None
    assert caught.value.where.startswith("file")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "name",
    [
        "a name twice",
        "a metadata key twice",
        "space before the brace",
        "unknown field",
        "name that runs backwards",
    ],
)
def test_the_library_takes_what_we_refuse(name):
    # Why this reader exists. When one fails, the library has learnt to refuse it.
    load(MALFORMED[name][0])


def test_refuses_a_header_before_reading_it():
    first_bytes = (9 << 20).to_bytes(8, "little")

    with pytest.raises(TensorFileError, match="at most 8388608"):
        header_end(first_bytes, 1 << 40, where="file", limits=ADAPTER_LIMITS)

    assert header_end(first_bytes, 1 << 40, where="file", limits=CHECKPOINT_LIMITS) == 8 + (
        9 << 20
    )


def test_refuses_more_tensors_than_the_limit():
    data = raw(
        {str(n): {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for n in "abc"}
    )

    with pytest.raises(TensorFileError, match="names 3 tensors, at most 2"):
        parse_header(data, len(data), where="file", limits=Limits(4096, 2))


def test_a_header_length_that_looks_like_a_pickle_is_read():
    text = b"{}" + b" " * (640 - 2)  # 640 is 80 02 00 00 …
    data = raw(text)

    assert parse_header(data, len(data), where="file").data_start == 648


def test_metadata_null_is_none_as_mlx_writes_it():
    data = raw(b'{"__metadata__":null}')

    assert parse_header(data, len(data), where="file").metadata == {}


def test_gives_tensors_in_the_order_of_their_bytes():
    data = raw(two([4, 8], [0, 4]), BYTES)

    header = parse_header(data, len(data), where="file")

    assert list(header.tensors) == ["b", "a"]
    assert header.tensors["a"].begin == 4


def test_takes_empty_tensors_scalars_and_names_in_any_script():
    data = raw(
        {
            "пустой": {"dtype": "F32", "shape": [0, 3], "data_offsets": [0, 0]},
            "scalar": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
        },
        bytes(4),
    )

    header = parse_header(data, len(data), where="file")

    assert header.tensors["пустой"].elements == 0
    assert header.tensors["scalar"].elements == 1
    assert header.tensors["scalar"].size_bytes == 4


def test_reads_what_the_library_writes():
    tensors = {
        "x": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
        "y": torch.ones(3, dtype=torch.float64),
        "z": torch.tensor([True, False, True]),
    }
    data = save(tensors, metadata={"format": "pt", "by": "us"})

    header = parse_header(data, len(data), where="file")

    assert header.metadata == {"format": "pt", "by": "us"}
    assert {n: (t.dtype, t.shape) for n, t in header.tensors.items()} == {
        "x": ("BF16", (2, 3)),
        "y": ("F64", (3,)),
        "z": ("BOOL", (3,)),
    }


def test_writes_the_bytes_that_the_library_writes():
    tensors = {f"layer.{n}.weight": torch.zeros(n + 1, 3) for n in range(9)}
    theirs = save(tensors, metadata={"format": "pt"})

    head, header = encode_header(
        [(name, "F32", tuple(tensor.shape)) for name, tensor in tensors.items()],
        {"format": "pt"},
    )

    assert theirs.startswith(head)
    assert header.file_size == len(theirs)
    assert header.data_start == len(head)
    assert len(head) % 8 == 0


def test_the_library_knows_every_dtype_of_ours():
    for dtype, bits in BITS.items():
        head, header = encode_header([("t", dtype, (8,))], {})
        data = head + bytes(bits)

        [(name, entry)] = safetensors.deserialize(data)

        assert (name, entry["shape"]) == ("t", [8])
        assert header.file_size == len(data)


def test_says_which_dtypes_are_real_numbers():
    assert [d for d in BITS if not is_float(d)] == [
        *("BOOL", "U8", "I8", "I16", "U16", "I32", "U32", "I64", "U64", "C64")
    ]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([("t", "F32", (1,)), ("t", "F32", (1,))], "written twice"),
        ([("t", "F33", (1,))], "is unknown"),
        ([("", "F32", (1,))], "name is empty"),
        ([("t\u202e", "F32", (1,))], "cannot be seen"),
        ([("t", "F32", (-1,))], "shape holds -1"),
        ([("__metadata__", "F32", (1,))], "__metadata__"),
    ],
)
def test_writes_nothing_that_it_would_refuse(tensors, message):
    with pytest.raises(TensorFileError, match=message):
        encode_header(tensors, {})
