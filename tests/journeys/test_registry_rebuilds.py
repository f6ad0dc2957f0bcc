"""The registry in the repository is what its sources make, byte for byte."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.base
def test_rebuilding_the_registry_gives_the_same_bytes(tmp_path):
    subprocess.run(
        [sys.executable, "examples/build_registry.py", str(tmp_path / "registry")],
        cwd=ROOT,
        check=True,
        env={**os.environ, "LORAHUB_HOME": str(tmp_path / "h")},
    )

    expected = contents(ROOT / "registry")
    del expected["README.md"]

    assert contents(tmp_path / "registry") == expected
