"""Every hostile adapter, package and registry is refused, by name and at little cost."""

import re

import pytest

from tests.conformance.hostile.build import CASES, build_all
from tests.conformance.hostile.case import SECRET
from tests.conformance.hostile.probe import ask

# An interpreter with the packages that commands need takes 60 MB of it.
MOST_MB = 300
MOST_S = 2

STEERING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069]"
)


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    root = build_all(tmp_path_factory.mktemp("hostile") / "set")
    requests = [(case.arguments(root / slug), root / slug) for slug, case in CASES.items()]
    return dict(zip(CASES, ask(requests), strict=True))


def test_set_holds_at_least_eighty_cases_over_the_threats():
    threats = {case.threat.partition(" ")[0] for case in CASES.values()}

    assert len(CASES) >= 80
    assert {str(row) for row in range(19, 34) if row not in (21, 32)} <= threats


@pytest.mark.parametrize("slug", CASES)
def test_case_is_refused_by_name(slug, answers):
    case, answer = CASES[slug], answers[slug]
    said = answer.out + answer.err

    assert answer.code == case.code, said or answer
    assert case.says in said
    if case.command in ("validate", "strictly"):
        assert f" {case.refusal} " in answer.out
    elif case.command != "check":
        assert answer.error == case.refusal
    assert "Traceback" not in said
    assert "bug in lora_hub" not in said


@pytest.mark.parametrize("slug", CASES)
def test_case_reads_nothing_of_others_and_prints_nothing_that_steers(slug, answers):
    answer = answers[slug]

    assert answer.outside == ()
    assert SECRET not in answer.out + answer.err
    assert not STEERING.search(answer.out + answer.err)


@pytest.mark.parametrize("slug", CASES)
def test_case_costs_little(slug, answers):
    assert answers[slug].peak_mb < MOST_MB
    assert answers[slug].cpu_s < MOST_S
