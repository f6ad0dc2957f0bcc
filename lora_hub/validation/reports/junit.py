"""Findings as JUnit XML, which most CI systems show as a table of tests.

A suite for each thing that was checked, a test for each finding: what fails the run is a
failure, what is waived is skipped, the rest passes and says what was found. A suite
without findings holds one test that passed, so that it is seen to have run.
Source: https://github.com/testmoapp/junitxml, the form that GitLab and Jenkins read.
"""

import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence

from lora_hub.validation.findings import Checked, Finding
from lora_hub.validation.places import place_of
from lora_hub.validation.rules import RULES, Severity

# What XML 1.0 cannot say, not even escaped: https://www.w3.org/TR/xml/#charsets.
_UNSAID = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def render(checked: Sequence[Checked], fail_on: Severity = "error") -> str:
    """Return the document."""
    root = ET.Element("testsuites", name="lorahub validate")
    for each in checked:
        root.append(_suite(each, fail_on))
    for count in ("tests", "failures", "skipped"):
        root.set(count, str(sum(int(suite.get(count, 0)) for suite in root)))
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(
        root, encoding="unicode"
    )


def _suite(each: Checked, fail_on: Severity) -> ET.Element:
    name = _said(place_of(each.subject, each.subject).path)
    failures = sum(one.fails(fail_on) for one in each.findings)
    skipped = sum(one.waived is not None for one in each.findings)
    suite = ET.Element(
        "testsuite",
        name=name,
        tests=str(len(each.findings) or 1),
        failures=str(failures),
        skipped=str(skipped),
    )
    for one in each.findings:
        suite.append(_case(one, each.subject, name, fail_on))
    if not each.findings:
        ET.SubElement(suite, "testcase", classname=name, name="no findings")
    return suite


def _case(one: Finding, subject: str, suite: str, fail_on: Severity) -> ET.Element:
    place = place_of(one.where, subject)
    at = f"{place.path}: {place.inside}" if place.inside else place.path
    case = ET.Element("testcase", classname=suite, name=_said(f"{one.rule} {at}"))
    text = _said(f"{one.severity}: {one.message}\n{RULES[one.rule].why}\n{one.hint}")
    if one.waived is not None:
        ET.SubElement(case, "skipped", message=_said(f"waived: {one.waived}"))
    elif one.fails(fail_on):
        failure = ET.SubElement(case, "failure", type=one.rule, message=_said(one.message))
        failure.text = text
    else:
        ET.SubElement(case, "system-out").text = text
    return case


def _said(text: str) -> str:
    return _UNSAID.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
