"""Products by the grouped kernels: which host has them, and that they are torch's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import lora_hub
from lora_hub.errors import InputError
from tests.builders import tiny_model

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    "chosen", ["not slow", pytest.param("slow", marks=pytest.mark.slow)]
)
def test_a_host_with_kernels_does_what_one_without_them_does(chosen):
    triton = pytest.importorskip("triton", reason="Triton is there on Linux x86-64")
    if triton.__version__ < "3.7":
        pytest.skip("its interpreter fails with today's numpy")
    # A process of its own: the variable counts when Triton is imported.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    inner = Path(__file__).with_name("interpreted.py")

    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", chosen,
         str(inner)],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip

    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert " passed" in ran.stdout


@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="Triton interprets")
def test_kernels_that_do_not_run_on_the_model_are_refused():
    with pytest.raises(InputError, match="on cpu, where Triton's kernels do not run"):
        lora_hub.attach(tiny_model(), kernels="triton")
    with pytest.raises(InputError, match="kernels='cuda' is no choice"):
        lora_hub.attach(tiny_model(), kernels="cuda")


@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="Triton interprets")
@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_nothing_is_captured_without_kernels(kernels):
    host = lora_hub.attach(tiny_model(), kernels=kernels)

    with (
        pytest.raises(InputError, match="no kernels that a captured graph"),
        host.capturing(),
    ):
        pass
