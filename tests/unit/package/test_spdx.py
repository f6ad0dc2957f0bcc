import pytest

from lora_hub.errors import InputError
from lora_hub.package.spdx import check_license, identifiers


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("Apache-2.0", ["Apache-2.0"]),
        ("GPL-2.0+", ["GPL-2.0+"]),
        ("MIT OR Apache-2.0", ["MIT", "Apache-2.0"]),
        ("(MIT AND (BSD-3-Clause OR ISC))", ["MIT", "BSD-3-Clause", "ISC"]),
        ("GPL-3.0-only WITH Classpath-exception-2.0", ["GPL-3.0-only"]),
        ("LicenseRef-Gemma", ["LicenseRef-Gemma"]),
        ("DocumentRef-x:LicenseRef-y AND MIT", ["DocumentRef-x:LicenseRef-y", "MIT"]),
    ],
)
def test_expressions_are_accepted_and_name_their_licences(text, names):
    check_license(text)

    assert list(identifiers(text)) == names


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "it ends where an identifier is expected"),
        ("other", "'other' names no licence"),
        ("Apache 2.0", "it goes on where it should end"),
        ("MIT and ISC", "it goes on where it should end"),
        ("MIT AND", "it ends where an identifier is expected"),
        ("MIT OR or", "'or' stands where an identifier"),
        ("AND", "'AND' stands where an identifier"),
        ("(MIT", "it ends where"),
        ("MIT)", "it goes on where it should end"),
        ("(MIT ISC)", "'ISC' stands where '\\)' is expected"),
        ("GPL-3.0-only WITH", "it ends where"),
        ("MIT/ISC", "'MIT/ISC' stands where an identifier"),
        ("https://example.org/licence", "stands where an identifier"),
        ("MIT\x1b[31m", "stands where an identifier"),
    ],
)
def test_what_is_no_expression_is_refused(text, problem):
    with pytest.raises(InputError, match=problem):
        check_license(text)


@pytest.mark.parametrize("text", ["(" * 499, "(" * 100 + "MIT" + ")" * 100, "MIT OR " * 99])
def test_an_expression_without_end_is_refused_and_not_repeated(text):
    with pytest.raises(InputError, match="no SPDX expression") as caught:
        check_license(text)

    assert len(caught.value.problem) < 300
