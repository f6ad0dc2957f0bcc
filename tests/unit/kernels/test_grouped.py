"""The grouped product where there is no GPU: interpreted on the CPU, compiled for GPUs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lora_hub.kernels import grouped
from lora_hub.kernels.grouped import is_available

triton = pytest.importorskip("triton", reason="Triton is there on Linux x86-64")

ROOT = Path(__file__).parents[3]


@pytest.mark.skipif(
    triton.__version__ < "3.7", reason="its interpreter fails with today's numpy"
)
def test_the_kernels_agree_with_the_reference_under_the_interpreter():
    # A process of its own: the variable counts when Triton is imported.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    inner = Path(__file__).with_name("interpreted.py")

    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(inner)],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip

    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert " passed" in ran.stdout


@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="Triton interprets")
def test_a_cpu_is_no_device_for_the_kernels():
    assert not is_available("cpu")
    assert not is_available("cuda") or torch.cuda.is_available()
    assert not is_available(torch.device("meta"))


POINTERS = {
    "cells": "*i64", "first": "*i32", "last": "*i32", "slot": "*i32", "weight": "*fp32",
    "t": "*fp32",
}  # fmt: skip
# What the launcher's tensors and models' widths are multiples of, as Triton would see.
ALIGNED = {*POINTERS, "x", "y", "inp", "out", "stride", "width", "chunk"}


def compiled(name, dtype, tokens, capability):
    """Return the program as the launcher would have it compiled for a GPU of this kind."""
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lora_hub.kernels import programs

    program = getattr(programs, name)
    shape = grouped._shape(tokens, 4, 4096, 4096)
    constants = {
        "NARROW": {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}[dtype],
        "PRECISION": "ieee" if dtype == "fp32" else "tf32x3",
        "BLOCK_T": shape.block_t,
        "BLOCK_R": grouped.BLOCK_R,
        **({"BLOCK_K": shape.block_k} if name == "shrink" else {"BLOCK_N": shape.block_n}),
    }
    names = program.arg_names
    kinds = {**POINTERS, "x": f"*{dtype}", "y": f"*{dtype}"}
    source = ASTSource(
        fn=program,
        signature={
            name: "constexpr" if name in constants else kinds.get(name, "i32")
            for name in names
        },
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={
            (number,): [["tt.divisibility", 16]]
            for number, name in enumerate(names)
            if name in ALIGNED
        },
    )
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_warps": 4}).asm


@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="Triton interprets")
@pytest.mark.parametrize(
    ("dtype", "capability"),
    [
        ("bf16", 90),
        pytest.param("bf16", 80, marks=pytest.mark.slow),
        pytest.param("fp16", 90, marks=pytest.mark.slow),
        pytest.param("fp32", 90, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("name", ["shrink", "expand"])
@pytest.mark.parametrize("tokens", [1, 300])
def test_the_kernels_compile_and_read_16_bytes_at_once(
    name, dtype, tokens, capability, tmp_path, monkeypatch
):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    made = compiled(name, dtype, tokens, capability)

    assert made["cubin"]
    # Without the hint on the factors' addresses these loads are of 2 or 4 bytes each.
    assert re.search(r"ld\.global\S*\.v4|cp\.async\S* [^;]*, 0x10,", made["ptx"])
    assert not re.search(r"ld\.global\S*\.[bu]16", made["ptx"])
    if tokens > 1 and dtype != "fp32":
        assert "mma.sync" in made["ptx"]
