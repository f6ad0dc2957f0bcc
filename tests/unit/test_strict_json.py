"""JSON that two readers could understand differently is refused."""

import json
import os
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_hub import canonical, strict_json
from lora_hub.errors import DocumentError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=12,
)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"{} {}", "not JSON"),
        (b'{"a":1,"a":1}', "stands twice"),
        (b'[{"a":{"b":1,"b":2}}]', "stands twice"),
        (b'{"a":NaN}', "no JSON number"),
        (b'{"a":-Infinity}', "no JSON number"),
        (b"\xef\xbb\xbf{}", "not JSON"),
        (b'{"a":"\xff"}', "not UTF-8"),
        (b'{"a":"\\ud800"}', "half of a surrogate pair"),
        (b'{"\\uDC00\\ud800":1}', "half of a surrogate pair"),
        (b"[" * 100 + b"]" * 100, "levels deep"),
        (b'{"a":' * 100_000, "levels deep"),
        (b"1" * 10_000, "not JSON"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (b" " * 5_000_000, "bytes, at most"),
    ],
)
def test_refuses_ambiguous_and_malformed_documents(data, says):
    with pytest.raises(DocumentError) as caught:
        strict_json.decode(data, where="x.json")

    assert says in caught.value.problem
    assert caught.value.where == "x.json"


def test_brackets_in_strings_are_no_depth():
    value = {"a": "[" * 100, "b": 'x"' + "{" * 100}

    assert strict_json.decode(json.dumps(value).encode(), where="x") == value


def test_an_object_is_expected():
    with pytest.raises(DocumentError, match="expected an object"):
        strict_json.decode_object(b"[]", where="x")


def test_a_missing_file_is_a_document_error(tmp_path):
    with pytest.raises(DocumentError, match="cannot be read"):
        strict_json.read_object(tmp_path / "none.json")


@given(VALUES)
def test_reads_what_canonical_wrote(value):
    assert strict_json.decode(canonical.encode(value), where="x") == value


@given(VALUES)
def test_canonical_bytes_do_not_depend_on_the_order_of_keys(value):
    shuffled = json.loads(
        json.dumps(value), object_pairs_hook=lambda pairs: dict(reversed(pairs))
    )

    assert canonical.encode(shuffled) == canonical.encode(value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2**60])
def test_values_without_an_exact_json_form_are_refused(value):
    with pytest.raises(DocumentError):
        canonical.encode({"a": value})


def test_a_text_full_of_quotes_that_never_ends_is_refused_at_once():
    start = time.perf_counter()

    with pytest.raises(DocumentError, match="not JSON"):
        strict_json.decode(b'"' + b'\\"' * 2_000_000, where="file")

    assert time.perf_counter() - start < 5


def test_a_number_beyond_all_floats_is_refused():
    with pytest.raises(DocumentError, match="beyond what a float holds"):
        strict_json.decode(b'{"alpha": 1e999}', where="file")


def test_a_named_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "config.json")

    with pytest.raises(DocumentError, match="no regular file"):
        strict_json.read_object(tmp_path / "config.json")


def test_half_a_surrogate_pair_has_no_canonical_form_and_the_place_is_named():
    with pytest.raises(DocumentError) as caught:
        canonical.encode({"a": "\ud800"}, where="lorahub.json")

    assert caught.value.where == "lorahub.json"


def test_a_long_number_is_not_repeated_to_the_user():
    with pytest.raises(DocumentError) as caught:
        canonical.encode({"a": 10**4000})

    assert len(caught.value.problem) < 250
