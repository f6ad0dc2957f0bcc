"""Every example runs, as a reader would run it: from the repository root."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sysconfig.get_path("scripts")

# What each prints when it did what it says.
EXAMPLES = {
    "pack_and_sign.py": "published me/shakespeare 0.1.0 as sha256:",
    "apply_by_name.py": "210 of 210 targets applied",
    "many_at_once.py": "unmerged: every weight has the bits it had",
    "compose_two.py": "210 targets in",
    "merge_checkpoint.py": "210 of them changed",
    "validate_in_ci.sh": "2 names, 0 problems",
    "any_adapter.py": "attached and merged as in PEFT",
    "for_engines.py": "refused: vLLM would not compute this adapter",
}
# Run by other tests, or by `make`.
ELSEWHERE = {"build_registry.py", "demo.py", "get_base.py"}


def test_every_example_is_run_somewhere():
    files = {path.name for path in (ROOT / "examples").iterdir() if path.is_file()}

    assert files == set(EXAMPLES) | ELSEWHERE


@pytest.mark.base
@pytest.mark.parametrize("name", EXAMPLES)
def test_example_runs(name, tmp_path):
    script = ROOT / "examples" / name
    command = (
        ["bash", str(script)] if script.suffix == ".sh" else [sys.executable, str(script)]
    )

    result = subprocess.run(
        [*command, str(tmp_path / "out")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}",
            "LORAHUB_HOME": str(tmp_path / "home"),
            "LORAHUB_CACHE": str(tmp_path / "cache"),
        },
    )

    assert result.returncode == 0, result.stderr
    assert EXAMPLES[name] in result.stdout
