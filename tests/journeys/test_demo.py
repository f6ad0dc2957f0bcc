"""The demo does what it claims, and the README shows what it prints."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.base
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_demo_runs_and_prints_what_the_readme_shows():
    result = subprocess.run(
        [sys.executable, "examples/demo.py"], cwd=ROOT, capture_output=True, text=True
    )

    assert result.returncode == 0, result.stdout + result.stderr
    readme = (ROOT / "README.md").read_text()
    (shown,) = re.findall(r"## What the demo prints\n\n```\n(.*?)\n```", readme, re.DOTALL)
    printed = result.stdout.splitlines()
    missing = [
        line
        for line in without_verse(shown.splitlines())
        # An ellipsis in the README stands for what was left out.
        if not any(each.startswith(line.removesuffix("…")) for each in printed)
    ]
    assert missing == []


def without_verse(lines):
    """Leave out what the model wrote: another processor may round to another word."""
    is_verse = False
    for line in lines:
        is_verse = line.startswith("--- ") or (is_verse and line not in ("", "…"))
        if not is_verse:
            yield line.rstrip()
