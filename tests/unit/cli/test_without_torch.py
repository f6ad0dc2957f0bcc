"""Without the extra `torch`, what needs it says so; everything else works."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
REGISTRY = ["--registry", str(ROOT / "registry")]

# A process in which torch cannot be found, as after `pip install lora-hub`.
WITHOUT = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
"""
COMMAND = f"{WITHOUT}\nfrom lora_hub.cli.main import run\nsys.exit(run(sys.argv[1:]))"


def without_torch(program, *arguments):
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["compose", "style/milton", "--out", "out", *REGISTRY],
        ["merge", "style/milton", "--base", "base", "--out", "out", *REGISTRY],
    ],
)
def test_commands_that_need_torch_say_how_to_get_it(arguments):
    result = without_torch(COMMAND, *arguments)

    assert result.returncode == 2
    assert "the package 'torch' is needed for this" in result.stderr
    assert "lora-hub[torch]" in result.stderr


def test_python_names_that_need_torch_raise_an_error_of_ours():
    program = f"""{WITHOUT}
import lora_hub
try:
    lora_hub.attach
except lora_hub.LoraHubError as error:
    print(error.exit_code, error.hint)
"""

    assert without_torch(program).stdout == "2 pip install 'lora-hub[torch]'\n"


ADAPTER = str(ROOT / "tests/assets/adapters/shakespeare")
OUT = ["--out", "{out}"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["validate", str(ROOT / "registry")],
        ["validate", ADAPTER, "--format", "sarif"],
        ["inspect", "style/milton", *REGISTRY],
        ["inspect", ADAPTER],
        ["convert", ADAPTER, "--to", "mlx", *OUT],
        ["convert", ADAPTER, "--to", "peft", "--for", "vllm", *OUT],
        ["convert", "style/milton", "--to", "peft", "--for", "lorax", *OUT, *REGISTRY],
    ],
)
def test_the_packaging_half_works_without_torch(arguments, tmp_path):
    said = [text.format(out=tmp_path / "out") for text in arguments]

    result = without_torch(COMMAND, *said)

    assert result.returncode == 0, result.stderr
