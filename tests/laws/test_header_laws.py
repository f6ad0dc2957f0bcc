"""The header for all headers: what we write we read, and the library reads it alike."""

import contextlib
import json

import pytest
import safetensors
from hypothesis import given
from hypothesis import strategies as st

from lora_hub.errors import TensorFileError
from lora_hub.tensors.dtypes import BITS
from lora_hub.tensors.file import TensorFile
from lora_hub.tensors.header import METADATA, encode_header, parse_header
from lora_hub.tensors.write import chunks_of

Names = st.text(min_size=1, max_size=30).filter(
    lambda name: name.isprintable() and name != METADATA
)
Shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
Whole = sorted(dtype for dtype, bits in BITS.items() if bits % 8 == 0)
Specs = st.dictionaries(Names, st.tuples(st.sampled_from(Whole), Shapes), max_size=8).map(
    lambda specs: [(name, *spec) for name, spec in specs.items()]
)
Texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
Metadata = st.dictionaries(Texts, Texts, max_size=4)


@given(Specs, Metadata)
def test_reading_what_we_wrote_gives_the_same_header(specs, metadata):
    head, header = encode_header(specs, metadata)

    assert parse_header(head, header.file_size, where="file") == header
    assert [
        (t.name, t.dtype, t.shape) for t in header.tensors.values() if t.size_bytes
    ] == [spec for spec in specs if 0 not in spec[2]]
    assert header.metadata == metadata


@given(Specs, Metadata, st.randoms())
def test_the_library_reads_what_we_wrote_alike(specs, metadata, random):
    content = {}
    for name, dtype, shape in specs:
        _, one = encode_header([(name, dtype, shape)], {})
        content[name] = random.randbytes(one.tensors[name].size_bytes)

    data = b"".join(
        bytes(chunk) for chunk in chunks_of(specs, lambda name: [content[name]], metadata)
    )

    theirs = dict(safetensors.deserialize(data))
    ours = TensorFile.from_bytes(data, where="file")
    assert {name: bytes(entry["data"]) for name, entry in theirs.items()} == content
    assert {name: bytes(ours.read(name)) for name in ours.header.tensors} == content
    assert {name: tuple(entry["shape"]) for name, entry in theirs.items()} == {
        name: info.shape for name, info in ours.header.tensors.items()
    }


Json = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 2**65) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(Texts, inner, max_size=3),
    max_leaves=8,
)
Entry = st.fixed_dictionaries(
    {"dtype": st.sampled_from(Whole) | Json, "shape": st.lists(st.integers(-1, 3)) | Json},
    optional={
        "data_offsets": st.lists(st.integers(-1, 20), max_size=3) | Json,
        "more": Json,
    },
)


@given(st.dictionaries(Texts, Entry | Json, max_size=4), st.binary(max_size=40))
def test_a_header_is_read_alike_or_refused(value, data):
    # Whatever the header says: ours refuses it in words, or the library reads the same.
    text = json.dumps(value).encode()
    file = len(text).to_bytes(8, "little") + text + data

    try:
        header = parse_header(file, len(file), where="file")
    except TensorFileError:
        return
    theirs = dict(safetensors.deserialize(file))
    assert {name: tuple(entry["shape"]) for name, entry in theirs.items()} == {
        name: info.shape for name, info in header.tensors.items()
    }


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused_in_words(data):
    with contextlib.suppress(TensorFileError):  # any other error fails
        header = parse_header(data, len(data), where="file")

        assert header.file_size == len(data)


@given(Specs, Metadata, st.data())
def test_a_file_cut_off_or_longer_is_refused(specs, metadata, data):
    head, header = encode_header(specs, metadata)
    file = head + bytes(header.file_size - len(head))
    cut = data.draw(st.integers(0, len(file) - 1))

    for changed in (file[:cut], file + b"\0"):
        with pytest.raises(TensorFileError):
            parse_header(changed, len(changed), where="file")
