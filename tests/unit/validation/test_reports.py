import json
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest
from jsonschema import Draft4Validator

from lora_hub import strict_json
from lora_hub.validation.findings import Checked, finding
from lora_hub.validation.reports import REPORTS
from lora_hub.validation.rules import RULES

SCHEMA = Path(__file__).parents[2] / "assets/sarif/sarif-schema-2.1.0.json"

ERROR = finding("LH002", "ads/verse/lorahub.json#/name", "'Verse' does not match")
WARNING = finding("LH040", "ads/verse", "there is no model.sig")
NOTE = finding("LH043", "ads/verse/model.sig", "no key is known for it")
WAIVED = replace(WARNING, waived="signed next week")
CLEAN = Checked("ads/clean", ())


def checked(*findings):
    return (Checked("ads/verse", findings), CLEAN)


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_text_gives_two_lines_each_and_counts():
    text = REPORTS["text"](checked(ERROR, WAIVED, NOTE), "error")

    assert text.splitlines() == [
        "error LH002 ads/verse/lorahub.json#/name: 'Verse' does not match",
        f"    {ERROR.hint}",
        "waived warning LH040 ads/verse: there is no model.sig",
        "    signed next week",
        "note LH043 ads/verse/model.sig: no key is known for it",
        f"    {NOTE.hint}",
        "1 error, 1 note, 1 waived",
    ]


def test_json_gives_the_fields_of_findings():
    value = json.loads(REPORTS["json"](checked(ERROR, WAIVED), "error"))

    assert [one["rule"] for one in value["findings"]] == ["LH002", "LH040"]
    assert [one["waived"] for one in value["findings"]] == [None, "signed next week"]
    assert set(value["findings"][0]) == {
        *("rule", "severity", "where", "message", "hint", "waived"),
    }


def test_reports_of_nothing_say_so():
    assert REPORTS["text"]((), "error") == "no findings"
    assert json.loads(REPORTS["json"]((), "error")) == {"findings": []}
    assert REPORTS["github"]((), "error") == "no findings"


# ── SARIF ────────────────────────────────────────────────────────────────────────────


def sarif(*groups):
    return json.loads(REPORTS["sarif"](groups, "error"))


@pytest.mark.parametrize("groups", [(), checked(ERROR, WARNING, NOTE, WAIVED)])
def test_sarif_follows_the_schema_of_the_standard(groups):
    validator = Draft4Validator(json.loads(SCHEMA.read_text()))

    assert [error.message for error in validator.iter_errors(sarif(*groups))] == []


def test_sarif_has_every_rule_with_its_help():
    (run,) = sarif()["runs"]

    rules = run["tool"]["driver"]["rules"]
    assert [rule["id"] for rule in rules] == list(RULES)
    assert rules[0]["help"] == {"text": RULES["LH001"].mend}
    assert rules[0]["defaultConfiguration"] == {"level": "error"}


def test_sarif_result_names_rule_level_file_and_what_is_in_it():
    (result,) = sarif(*checked(ERROR))["runs"][0]["results"]

    assert result["ruleId"] == list(RULES)[result["ruleIndex"]] == "LH002"
    assert result["level"] == "error"
    (location,) = result["locations"]
    physical = location["physicalLocation"]
    assert physical["artifactLocation"]["uri"] == "ads/verse/lorahub.json"
    assert location["logicalLocations"] == [{"fullyQualifiedName": "/name"}]
    assert result["suppressions"] == []


def test_sarif_names_nothing_of_the_machine(root):
    inside, outside = root / "ads/a b", "/srv/secret/verse"
    groups = (
        Checked(str(inside), (finding("LH040", str(inside), "x"),)),
        Checked(outside, (finding("LH012", f"{outside}/extra.py", "x"),)),
    )

    text = json.dumps(sarif(*groups))

    assert '"uri": "ads/a%20b"' in text
    assert '"uri": "verse/extra.py"' in text
    assert str(root) not in text
    assert "secret" not in text


def test_sarif_fingerprints_stay_when_the_checkout_moves_and_differ_within_one(
    tmp_path, monkeypatch
):
    def fingerprints(root):
        (root / "ads/verse").mkdir(parents=True)
        monkeypatch.chdir(root)
        found = (ERROR, replace(ERROR, message="again"), NOTE)
        moved = Checked(
            str(root / "ads/verse"),
            tuple(replace(one, where=f"{root}/{one.where}") for one in found),
        )
        return [
            result["fingerprints"]["lorahub/v1"]
            for result in sarif(moved)["runs"][0]["results"]
        ]

    here, there = fingerprints(tmp_path / "here"), fingerprints(tmp_path / "there")

    assert here == there
    assert len(set(here)) == 3


def test_sarif_shows_a_waived_finding_as_suppressed():
    (result,) = sarif(*checked(WAIVED))["runs"][0]["results"]

    assert result["suppressions"] == [
        {"kind": "external", "status": "accepted", "justification": "signed next week"}
    ]


# ── JUnit ────────────────────────────────────────────────────────────────────────────


def junit(groups, fail_on="error"):
    return ET.fromstring(REPORTS["junit"](groups, fail_on))


def test_junit_fails_what_fails_skips_what_is_waived_and_passes_the_rest():
    root = junit(checked(ERROR, WARNING, NOTE, WAIVED))

    verse, clean = root
    assert root.attrib["failures"] == verse.attrib["failures"] == "1"
    assert verse.attrib["skipped"] == "1"
    assert [[child.tag for child in case] for case in verse] == [
        ["failure"],
        ["system-out"],
        ["system-out"],
        ["skipped"],
    ]
    assert verse[0].attrib["name"] == "LH002 ads/verse/lorahub.json: /name"
    assert clean.attrib["tests"] == "1"
    assert clean[0].attrib["name"] == "no findings"


def test_junit_fails_warnings_where_they_fail_the_run():
    root = junit(checked(ERROR, WARNING, NOTE), fail_on="warning")

    assert root.attrib["failures"] == "2"


def test_junit_is_xml_whatever_the_message_holds():
    nasty = finding("LH012", "ads/verse/\x1b[2J<&>\ud800", 'a "quote" \x00 ]]> é')

    (case,) = junit((Checked("ads/verse", (nasty,)),))[0]

    assert case.attrib["name"] == "LH012 ads/verse/\\u001b[2J<&>\\ud800"
    assert case[0].attrib["message"] == 'a "quote" \\u0000 ]]> é'


# ── GitHub ───────────────────────────────────────────────────────────────────────────


def test_github_gives_a_command_for_each_finding_and_none_for_what_is_waived():
    lines = REPORTS["github"](checked(ERROR, WARNING, NOTE, WAIVED), "error").splitlines()

    assert [line.partition(" ")[0] for line in lines] == [
        *("::error", "::warning", "::notice", "waived"),
        "1",
    ]
    assert lines[0] == (
        "::error file=ads/verse/lorahub.json,title=LH002 the manifest follows its schema"
        f"::/name: 'Verse' does not match. {ERROR.hint}"
    )
    assert lines[-1] == "1 error, 1 warning, 1 note, 1 waived"


def test_github_commands_cannot_be_forged_by_names_or_messages():
    nasty = finding("LH012", "ads/verse/a,b:c%0A", "50 %\r\n::error::forged")

    (line, _) = REPORTS["github"]((Checked("ads/verse", (nasty,)),), "error").split("\n")

    assert line.startswith("::error file=ads/verse/a%2Cb%3Ac%250A,title=")
    assert "::50 %25%0D%0A::error::forged." in line


# ── names and texts of strangers ─────────────────────────────────────────────────────

# A file's name as Python gives it where it is no UTF-8, a line of its own, a command.
NASTY = "ads/verse/a\n\udcff::error::b\x1b[2J%,:<&>\r\x85\u2028no findings"


def nasty():
    """Return a finding of every rule, about such a name and in such words."""
    found = [
        replace(finding(rule, NASTY, NASTY), waived=NASTY if rule == "LH001" else None)
        for rule in RULES
    ]
    inside = finding("LH002", f"ads/verse/lorahub.json#/{NASTY}", NASTY)
    return (Checked("ads/verse", (*found, inside)), Checked(NASTY, (found[1],)))


def test_sarif_of_every_rule_and_any_name_follows_the_schema_and_is_strict_json():
    text = REPORTS["sarif"](nasty(), "error")

    value = strict_json.decode(text.encode(), where="sarif")
    validator = Draft4Validator(json.loads(SCHEMA.read_text()))
    assert [error.message for error in validator.iter_errors(value)] == []
    results = value["runs"][0]["results"]
    assert {one["ruleId"] for one in results} == set(RULES)
    uris = [
        one["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
        for one in results
    ]
    assert all(uri.isascii() and uri.isprintable() and " " not in uri for uri in uris)


def test_json_of_any_name_is_strict_json():
    value = strict_json.decode(REPORTS["json"](nasty(), "error").encode(), where="json")

    assert "\\udcff::error::b" in value["findings"][0]["where"]


def test_junit_of_any_name_is_read_by_a_parser():
    root = ET.fromstring(REPORTS["junit"](nasty(), "error"))

    assert len(list(root.iter("testcase"))) == len(RULES) + 2


@pytest.mark.parametrize(("form", "lines"), [("text", 2), ("github", 1)])
def test_no_name_or_text_begins_a_line_of_its_own(form, lines):
    report = REPORTS[form](nasty(), "error")

    # What else could end a line, the command line makes visible when it prints.
    found = report.split("\n")
    assert len(found) == lines * (len(RULES) + 2) + 1
    assert not any(line.lstrip().startswith("::error::b") for line in found)
