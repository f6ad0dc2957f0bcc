"""The benchmark that wants a GPU runs through without one, on sizes that mean nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_the_benchmark_for_gpus_runs_through_and_says_what_it_ran_on(tmp_path):
    program = ROOT / "benchmarks" / "gpu_runtime.py"

    ran = subprocess.run(
        [sys.executable, str(program), "--tiny", "--out", str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip

    assert ran.returncode == 0, ran.stdout + ran.stderr
    (written,) = tmp_path.glob("*-gpu_runtime.json")
    document = json.loads(written.read_text())
    assert document["machine"]["device"]
    sections = {"products", "prefill", "decode", "graphs", "merging", "cold"}
    assert set(document["results"]) == sections
    assert document["results"]["decode"]["batch 1, as many adapters"]["over bare"]["PEFT's"]
