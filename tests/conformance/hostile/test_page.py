"""docs/hostile.md says what the set holds and what others say to it."""

import re

import pytest

from tests.conformance.hostile.build import CASES
from tests.conformance.hostile.oracles import ask_all
from tests.conformance.hostile.page import PAGE, ours, page


def test_page_tells_of_every_case_and_no_other():
    rows = re.findall(r"^\| ([^|]+) \| (\w+: \w+) \|", PAGE.read_text(), re.MULTILINE)

    assert sorted(rows) == sorted((case.name, ours(case)) for case in CASES.values())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_page_tells_what_others_say_today(tmp_path):
    assert page(ask_all(tmp_path / "set")) == PAGE.read_text()
