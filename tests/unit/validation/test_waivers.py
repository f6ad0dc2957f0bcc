import datetime as dt
from pathlib import Path

import pytest

from lora_hub.errors import DocumentError, InputError
from lora_hub.validation.findings import Checked, finding
from lora_hub.validation.waivers import apply, not_believed, own, read_waivers

TODAY = dt.date(2026, 11, 23)
WAIVER = """
[[waiver]]
rule = "{rule}"
where = "{where}"
reason = "older than the rule"
until = {until}
"""


@pytest.fixture
def waivers(tmp_path):
    def write(rule="LH024", where="old/*", until="2026-12-31"):
        file = tmp_path / "lorahub-waivers.toml"
        text = WAIVER.format(rule=rule, where=where, until=until)
        file.write_text((file.read_text() if file.exists() else "") + text)
        return read_waivers(file)

    return write


@pytest.fixture
def checked(tmp_path):
    folder = str(tmp_path / "old" / "verse")
    name = finding("LH024", f"{folder}/adapter_config.json", "the adapter names no base")
    return (Checked(folder, (name, finding("LH031", folder, "zero"))),)


def test_waived_finding_keeps_its_place_and_does_not_fail(checked, waivers):
    (each,) = apply(checked, waivers(), today=TODAY)

    assert [one.waived for one in each.findings] == ["older than the rule", None]
    assert [one.fails("warning") for one in each.findings] == [False, True]


@pytest.mark.parametrize(
    "where", ["old", "old/*", "old/verse", "*/verse", "old/verse/adapter_config.json", "*"]
)
def test_glob_covers_a_file_or_a_folder_above_it(where, checked, waivers):
    (each,) = apply(checked, waivers(where=where), today=TODAY)

    assert each.findings[0].waived


@pytest.mark.parametrize("where", ["verse", "new/*", "old/vers", "adapter_config.json"])
def test_glob_that_does_not_match_covers_nothing_and_is_a_note(where, checked, waivers):
    each, about = apply(checked, waivers(where=where), today=TODAY)

    assert each.findings[0].waived is None
    assert [(one.rule, one.severity) for one in about.findings] == [("LH061", "note")]


def test_waiver_holds_on_its_last_day(checked, waivers):
    (each,) = apply(checked, waivers(until="2026-11-23"), today=TODAY)

    assert each.findings[0].waived


def test_expired_waiver_covers_nothing_and_is_a_finding(checked, waivers, tmp_path):
    each, about = apply(checked, waivers(until="2026-11-22"), today=TODAY)

    assert each.findings[0].waived is None
    (expired,) = about.findings
    assert (expired.rule, expired.severity) == ("LH060", "warning")
    assert expired.where == f"{tmp_path / 'lorahub-waivers.toml'}#/waiver/0"
    assert expired.message == ("the waiver of LH024 for 'old/*' has expired on 2026-11-22")


def test_each_of_two_waivers_for_one_finding_counts_as_used(checked, waivers):
    waivers(where="old")

    result = apply(checked, waivers(where="old/*"), today=TODAY)

    assert len(result) == 1


def test_file_where_the_user_stands_is_believed(tmp_path, waivers, monkeypatch):
    waivers()
    monkeypatch.chdir(tmp_path)

    assert own([Path("adapters"), Path("../else")]) == (Path("lorahub-waivers.toml"),)
    assert own([tmp_path.parent / "else"]) == (Path("lorahub-waivers.toml"),)
    assert not_believed([Path("adapters")], [Path("lorahub-waivers.toml")]) == ()


@pytest.mark.parametrize("path", [".", "..", "/", "link", "../{name}"])
def test_file_where_the_user_stands_is_not_believed_if_that_is_checked(
    path, tmp_path, waivers, monkeypatch
):
    waivers()
    (tmp_path / "link").symlink_to(".")
    monkeypatch.chdir(tmp_path)

    assert own([Path(path.format(name=tmp_path.name))]) == ()


def test_file_in_a_folder_above_what_is_checked_is_not_believed(
    tmp_path, waivers, monkeypatch
):
    waivers()
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path / "a")

    assert own([tmp_path / "b"]) == ()


def test_files_in_and_beside_what_is_checked_are_told_of_once(tmp_path):
    (tmp_path / "a").mkdir()
    for folder in (tmp_path, tmp_path / "a"):
        (folder / "lorahub-waivers.toml").touch()
    (tmp_path / "b").mkdir()
    (tmp_path / "b/lorahub-waivers.toml").symlink_to("gone")

    told = not_believed([tmp_path / "a", tmp_path / "b", tmp_path / "c"], [])

    assert [each.subject for each in told] == [
        str(tmp_path / place / "lorahub-waivers.toml") for place in ("a", "", "b")
    ]
    assert {(f.rule, f.severity) for each in told for f in each.findings} == {
        ("LH065", "note")
    }


GOOD = {"rule": '"LH024"', "where": '"x"', "reason": '"y"', "until": "2027-01-01"}
MALFORMED = {
    "no TOML": ("[[waiver", "no TOML"),
    "not UTF-8": (b"\xff", "no TOML"),
    "other tables": ("[other]", "nothing else"),
    "waiver is no list": ("waiver = 1", "nothing else"),
    "waiver is a list of numbers": ("waiver = [1]", "is no table"),
    "no date": ({"until": None}, "has the fields"),
    "another field": ({"note": '"z"'}, "has the fields"),
    "an unknown rule": ({"rule": '"LH999"'}, "is no rule"),
    "a rule that is a list": ({"rule": "[]"}, "expected a text"),
    "an empty reason": ({"reason": '" "'}, "expected a text"),
    "a text for a date": ({"until": '"2027-01-01"'}, "expected a date"),
    "a moment for a date": ({"until": "2027-01-01T00:00:00Z"}, "expected a date"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_waivers_are_refused(case, tmp_path):
    content, says = MALFORMED[case]
    if isinstance(content, dict):
        fields = {key: value for key, value in (GOOD | content).items() if value}
        content = "[[waiver]]\n" + "\n".join(f"{k} = {v}" for k, v in fields.items())
    file = tmp_path / "waivers.toml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())

    with pytest.raises(DocumentError) as caught:
        read_waivers(file)

    assert says in caught.value.problem


def test_waivers_that_are_not_there_are_bad_input(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_waivers(tmp_path / "none.toml")
