"""What others say to the hostile set: safetensors, PEFT and model_signing as installed.

    python -m tests.conformance.hostile.oracles SET   answers on stdout, one line a case

Each is asked in a process of its own, forked from one that has imported them, and has ten
seconds and as much memory as most machines. Loading is all that is asked: what PEFT takes
without an exception, however much it warns, it accepts.
"""

import contextlib
import json
import os
import resource
import signal
import stat
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.conformance.hostile.build import CASES, build_all
from tests.conformance.hostile.case import CONFIG, FILL, PUBLIC, WEIGHTS, Case, Kind

SECONDS = 10
MEMORY = 8 << 30

ACCEPTS, REFUSES, HANGS, RUNS = "accepts", "refuses", "hangs", "runs code"
CRASHES, NOT_ASKED = "crashes", ""


def ask_all(root: Path) -> dict[str, dict[str, str]]:
    """Return slug → name of the package → what it says; the set is built below the root."""
    build_all(root)
    done = subprocess.run(
        [sys.executable, "-m", "tests.conformance.hostile.oracles", str(root)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[3],
        check=True,
    )
    answers: dict[str, dict[str, str]] = json.loads(done.stdout)
    return answers


def _by_safetensors(folder: Path, model: Any) -> None:
    from safetensors.torch import load_file

    load_file(folder / WEIGHTS)


def _by_peft(folder: Path, model: Any) -> None:
    from peft import PeftModel

    PeftModel.from_pretrained(model, folder)


def _by_model_signing(folder: Path, model: Any) -> None:
    from model_signing import verifying

    config = verifying.Config().use_elliptic_key_verifier(public_key=PUBLIC)
    config.verify(folder, folder / "model.sig")


ORACLES: Mapping[str, Callable[[Path, Any], None]] = {
    "safetensors": _by_safetensors,
    "peft": _by_peft,
    "model-signing": _by_model_signing,
}


Good = Mapping[str, Mapping[str, bytes]]


def is_asked(oracle: str, case: Case, folder: Path, good: Good) -> bool:
    """Return whether the case changes a file that the package reads."""
    reads = {"safetensors": (WEIGHTS,), "peft": (WEIGHTS, CONFIG)}
    if case.kind == "registry" or oracle not in reads:
        return case.kind == "package"
    return any(
        _content(folder / case.kind / name) != good[case.kind][name]
        for name in reads[oracle]
    )


def _content(path: Path) -> bytes | None:
    """Return the bytes of a small regular file, None for anything else."""
    is_small = os.path.lexists(path) and path.lstat().st_size < 1 << 20
    return path.read_bytes() if is_small and stat.S_ISREG(path.lstat().st_mode) else None


def _good(root: Path) -> Good:
    """Return kind → file name → bytes of what no case has changed."""
    kinds: tuple[Kind, ...] = ("adapter", "package")
    made = {kind: FILL[kind](root / "good") for kind in kinds}
    return {
        kind: {path.name: path.read_bytes() for path in made[kind].iterdir()}
        for kind in kinds
    }


def tiny_model() -> Any:
    """Return the base that the adapter of the set was made for."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=16,
            hidden_size=4,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
        )
    )


def serve(root: Path) -> dict[str, dict[str, str]]:
    import model_signing.verifying  # noqa: F401
    import peft  # noqa: F401
    import safetensors.torch  # noqa: F401
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    model, good = tiny_model(), _good(root)
    return {
        slug: {
            name: _in_child(oracle, root / slug / case.kind, model)
            if is_asked(name, case, root / slug, good)
            else NOT_ASKED
            for name, oracle in ORACLES.items()
        }
        for slug, case in CASES.items()
    }


def _in_child(oracle: Callable[[Path, Any], None], folder: Path, model: Any) -> str:
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        nothing = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(nothing, descriptor)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(SECONDS)
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        code = 1
        with contextlib.suppress(BaseException):
            oracle(folder, model)
            code = 0
        os._exit(code)
    _, status = os.waitpid(child, 0)
    if (folder / "owned").exists():
        return RUNS
    code = os.waitstatus_to_exitcode(status)
    return {0: ACCEPTS, 1: REFUSES, -signal.SIGALRM: HANGS}.get(code, CRASHES)


if __name__ == "__main__":
    print(json.dumps(serve(Path(sys.argv[1]))))
