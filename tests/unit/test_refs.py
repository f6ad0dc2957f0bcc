"""The grammar of names, versions and references."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_hub import refs
from lora_hub.errors import ReferenceSyntaxError

PARTS = st.from_regex(r"\A[a-z0-9](?:[a-z0-9]|-(?!-)){0,20}[a-z0-9]\Z").filter(
    lambda part: part not in {"con", "prn", "aux", "nul"}
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("style/milton", refs.Reference("style", "milton", "latest", None)),
        ("style/milton@1.0.0", refs.Reference("style", "milton", "1.0.0", None)),
        ("style/milton@1.0.0-rc.1", refs.Reference("style", "milton", "1.0.0-rc.1", None)),
        ("style/milton@~=1.0", refs.Reference("style", "milton", "~=1.0", None)),
        ("style/milton@>=1,<2", refs.Reference("style", "milton", ">=1,<2", None)),
        ("team:style/milton", refs.Reference("style", "milton", "latest", "team")),
        ("./reg:style/milton@latest", refs.Reference("style", "milton", "latest", "./reg")),
        (
            "oci://host/x:style/milton",
            refs.Reference("style", "milton", "latest", "oci://host/x"),
        ),
        (
            f"style/milton@sha256:{'a' * 64}",
            refs.Reference("style", "milton", f"sha256:{'a' * 64}", None),
        ),
    ],
)
def test_reads_references(text, expected):
    assert refs.parse(text) == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("milton", "a name is namespace/name"),
        ("style/", "a name is namespace/name"),
        ("Style/milton", "a name is namespace/name"),
        ("style/mil_ton", "a name is namespace/name"),
        ("style/mil--ton", "a name is namespace/name"),
        ("style/-milton", "a name is namespace/name"),
        ("style/../etc", "a name is namespace/name"),
        ("style/mílton", "a name is namespace/name"),
        ("style/con", "cannot be a folder name on Windows"),
        (":style/milton", "the registry before ':' is empty"),
        ("style/milton@", "nothing stands behind '@'"),
        ("style/milton@1.0", "neither a version, a range"),
        ("style/milton@newest", "neither a version, a range"),
        ("style/milton@sha256:12", "is no digest"),
    ],
)
def test_refuses_misspelt_references_and_says_why(text, says):
    with pytest.raises(ReferenceSyntaxError) as caught:
        refs.parse(text)

    assert says in caught.value.problem
    assert caught.value.hint


@given(PARTS, PARTS, st.sampled_from(["latest", "1.2.3", "~=1.0", f"sha256:{'0' * 64}"]))
def test_reading_what_was_printed_gives_the_reference_back(namespace, name, selector):
    reference = refs.Reference(namespace, name, selector)

    assert refs.parse(str(reference)) == reference


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("style/milton", ("style/milton", 1.0)),
        ("style/milton=0.5", ("style/milton", 0.5)),
        ("style/milton=-0.5", ("style/milton", -0.5)),
        ("style/milton@==1.0.0", ("style/milton@==1.0.0", 1.0)),
        ("style/milton@~=1.0", ("style/milton@~=1.0", 1.0)),
        ("style/milton@~=1.0=0.5", ("style/milton@~=1.0", 0.5)),
        ("style/milton@1.0.0=2", ("style/milton@1.0.0", 2.0)),
        ("./a=b/adapter", ("./a=b/adapter", 1.0)),
    ],
)
def test_reads_weights(text, expected):
    assert refs.parse_weighted(text) == expected


@pytest.mark.parametrize(
    "text", ["style/milton=half", "style/milton=nan", "style/milton=inf"]
)
def test_refuses_what_is_no_weight(text):
    with pytest.raises(ReferenceSyntaxError):
        refs.parse_weighted(text)


def test_versions_sort_as_semver_and_pep_440_do():
    ordered = ["0.9.0", "1.0.0-alpha.1", "1.0.0-beta.2", "1.0.0-rc.1", "1.0.0", "1.10.0"]

    shuffled = ordered[3:] + ordered[:3]

    assert sorted(shuffled, key=refs.parse_version) == ordered


@pytest.mark.parametrize(
    "text", ["1.0", "v1.0.0", "01.0.0", "1.0.0-x", "1.0.0+b", "1.0.0.dev1"]
)
def test_refuses_versions_that_the_two_schemes_read_apart(text):
    with pytest.raises(ReferenceSyntaxError):
        refs.parse_version(text)


@pytest.mark.parametrize("text", ["1.0." + "9" * 5000, "1\u0662.0.0", "1.0.0-rc.\u0661"])
def test_versions_have_ascii_digits_and_few(text):
    with pytest.raises(ReferenceSyntaxError) as caught:
        refs.parse_version(text)

    assert len(caught.value.problem) < 300


@pytest.mark.parametrize("text", [">=1." + "9" * 5000, ">=1.0," * 500 + "<2"])
def test_ranges_beyond_all_versions_are_refused_and_not_repeated(text):
    with pytest.raises(ReferenceSyntaxError) as caught:
        refs.parse(f"style/milton@{text}")

    assert len(caught.value.problem) < 300


def test_a_text_longer_than_a_path_may_be_is_no_path():
    assert not refs.is_path("a" * 5000)
