"""Documents that are spelt plainly: the same values as the strict reader's, or None."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_hub import canonical, plain_json

TEXTS = st.text(st.characters(codec="utf-8"), max_size=8)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), TEXTS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=4)
    ),
    max_leaves=12,
)
SPELLINGS = [
    {},
    {"separators": (",", ":")},
    {"separators": (",", ":"), "ensure_ascii": False},
    {"separators": (",", ":"), "sort_keys": True},
    {"indent": 2},
]


@given(value=VALUES, spelling=st.sampled_from(SPELLINGS))
def test_what_is_decoded_is_what_the_standard_library_reads(value, spelling):
    data = json.dumps(value, **spelling).encode()

    found = plain_json.decode(data)

    assert found is None or found == json.loads(data)


@given(value=VALUES, spelling=st.sampled_from(SPELLINGS))
def test_what_is_called_canonical_has_that_form(value, spelling):
    data = json.dumps(value, **spelling).encode()

    found = plain_json.decode_canonical(data)

    assert found is None or canonical.encode(found) == data


@given(data=st.binary(max_size=40) | st.text(st.sampled_from('[]{}":,1\\ a'), max_size=40))
def test_nothing_is_taken_that_is_no_document(data):
    data = data.encode() if isinstance(data, str) else data

    found = plain_json.decode(data)

    if found is not None:
        assert found == json.loads(data)


@pytest.mark.parametrize(
    "text",
    [
        '{"a":1,"a":1}',
        '{"a":1,"b":{"c":1,"c":2}}',
        "NaN",
        "[1e999]",
        "[-0]",
        "[1.0]x",
        "[1]]",
        '{"a":1} x',
        '["\\u0061"]',
        '["é"]',
        "[01]",
        "[1E5]",
    ],
)
def test_odd_spelling_is_left_to_the_strict_reader(text):
    assert plain_json.decode(text.encode()) is None


@pytest.mark.parametrize("depth", [1, 16, 17, 32, 33, 34, 100, 5000])
@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_what_nests_too_deep_is_not_taken(depth, opening, closing):
    data = (opening * depth + "1" + closing * depth).encode()

    found = plain_json.decode(data)

    assert found is None or depth <= plain_json.MAX_DEPTH


@pytest.mark.parametrize("texts", ['"]",', '"[",', '"[]",', '"}",', '"","]","",'])
def test_brackets_in_texts_do_not_hide_the_depth(texts):
    depth = 40
    data = ("[" + texts) * depth + "1" + "]" * depth

    assert plain_json.decode(data.encode()) is None


@pytest.mark.parametrize("number", ["9007199254740993", "123456789012345678", "0.5", "1e3"])
def test_numbers_of_many_spellings_are_not_called_canonical(number):
    assert plain_json.decode_canonical(f'{{"a":{number}}}'.encode()) is None
    assert plain_json.decode_canonical(f"[{number}]".encode()) is None


def test_members_out_of_order_are_read_and_not_called_canonical():
    data = b'{"b":1,"a":2}'

    assert plain_json.decode(data) == {"b": 1, "a": 2}
    assert plain_json.decode_canonical(data) is None


def test_line_break_behind_the_value_is_read():
    assert plain_json.decode(b'{"a":[1,2]}\n') == {"a": [1, 2]}
