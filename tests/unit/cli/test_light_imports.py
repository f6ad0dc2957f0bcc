"""What each command may import: start-up stays light, and packaging needs no torch.

Each command runs in a process of its own that prints the names of the packages it has
loaded; they are compared with a list of what it may load at most.
"""

import gc
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lora_hub.cli.main import COMMANDS, run
from tests.builders import tiny_adapter, tiny_base

ROOT = Path(__file__).parents[3]
REGISTRY = ROOT / "registry"

# Third-party packages; modules of the standard library and parts of these do not count.
START = {"click", "lora_hub"}
DOCUMENTS = START | {"msgspec", "rfc8785", "packaging", "platformdirs", "typing_extensions"}
SIGNATURES = DOCUMENTS | {"cryptography", "_cffi_backend", "_openssl"}
SCHEMA = {
    *("jsonschema", "jsonschema_specifications", "referencing", "rpds", "attr", "attrs"),
    "idna",
}

REG = ["--registry", "@registry"]
TEXT = ["--name", "me/ad", "--version", "1.1.0", "--task", "text-generation"]

# The command line (@ stands for the folder of the fixture), and what it may load.
CASES = {
    "--version": (["--version"], START),
    "--help": (["--help"], START),
    "keygen": (["keygen", "--out", "key"], SIGNATURES),
    "fingerprint": (["fingerprint", "@base"], DOCUMENTS),
    "pack": (
        ["pack", "@adapter", *TEXT, "--license", "MIT", "--base", "@base", "--out", "out"],
        DOCUMENTS,
    ),
    "sign": (["sign", "@package", "--key", "@my.key"], SIGNATURES),
    "verify": (["verify", "@package", "--key", "@my.key.pub"], SIGNATURES),
    "validate": (["validate", str(REGISTRY)], SIGNATURES | SCHEMA | {"numpy"}),
    "inspect": (["inspect", "@adapter"], DOCUMENTS | {"numpy"}),
    "push": (["push", "@package", *REG], SIGNATURES),
    "pull": (["pull", "me/ad", *REG], SIGNATURES),
    "search": (["search", *REG], DOCUMENTS),
    "show": (["show", "me/ad", *REG], SIGNATURES),
    "yank": (
        ["yank", "me/ad@1.0.0", "--reason", "x", "--key", "@my.key", *REG],
        SIGNATURES,
    ),
    "trust": (["trust", "list"], SIGNATURES),
    "cache": (["cache", "list"], DOCUMENTS),
    "registry": (["registry", "check", str(REGISTRY)], SIGNATURES),
    "convert": (
        ["convert", "@adapter", "--to", "mlx", "--out", "out"],
        DOCUMENTS | {"numpy"},
    ),
}
# Mathematics on tensors and nothing else: these load torch.
TENSORS = {"compose", "merge", "run"}

PROBE = """
import json, sys
before = set(sys.modules)
from lora_hub.cli.main import run
code = run(sys.argv[1:])
loaded = {name.partition(".")[0] for name in set(sys.modules) - before}
print(json.dumps([code, sorted(loaded - set(sys.stdlib_module_names))]))
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base, an adapter, a key, and a package of it, signed and published."""
    folder = tmp_path_factory.mktemp("world")
    base, adapter, package = (str(folder / name) for name in ("base", "adapter", "package"))
    key, registry = str(folder / "my.key"), str(folder / "registry")
    tiny_base(Path(base))
    tiny_adapter(Path(adapter))
    said = ["--name", "me/ad", "--version", "1.0.0", "--task", "text-generation"]
    places = ["--license", "MIT", "--base", base, "--out", package]
    for command in (
        ["keygen", "--out", key],
        ["pack", adapter, *said, *places],
        ["sign", package, "--key", key],
        ["registry", "init", registry],
        ["push", package, "--registry", registry, "--key", f"{key}.pub"],
    ):
        assert run(command) == 0
    return folder


def test_every_command_is_measured():
    assert set(COMMANDS) - TENSORS == {case for case in CASES if not case.startswith("--")}


@pytest.mark.parametrize("case", CASES)
def test_command_loads_only_what_it_may(case, world, tmp_path, monkeypatch):
    monkeypatch.setenv("LORAHUB_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LORAHUB_CACHE", str(tmp_path / "cache"))
    arguments, allowed = CASES[case]
    copy = shutil.copytree(world, tmp_path / "world")

    result = subprocess.run(
        [
            *(sys.executable, "-c", PROBE),
            *(f"{copy}/{text[1:]}" if text[:1] == "@" else text for text in arguments),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    code, loaded = json.loads(result.stdout.splitlines()[-1])

    assert code == 0, result.stderr
    # editable installs bring a finder of their own
    assert {name for name in loaded if not name.startswith("__editable__")} <= allowed


OWN_PROBE = """
import sys
from lora_hub.cli.main import run
assert run(["validate", sys.argv[1]]) == 0
print(*(name for name in sys.modules if name.startswith("lora_hub.")))
"""


def test_validate_of_a_package_loads_no_other_dialect_report_or_registry(
    world, tmp_path, monkeypatch
):
    monkeypatch.setenv("LORAHUB_HOME", str(tmp_path / "home"))

    result = subprocess.run(
        [sys.executable, "-c", OWN_PROBE, str(world / "package")],
        capture_output=True,
        text=True,
        check=True,
    )

    loaded = set(result.stdout.splitlines()[-1].split())
    assert {"lora_hub.formats.peft", "lora_hub.validation.reports.text"} <= loaded
    assert not loaded & {
        *(f"lora_hub.formats.{name}" for name in ("diffusers", "gguf", "kohya", "mlx")),
        *(f"lora_hub.validation.reports.{name}" for name in ("junit", "sarif")),
        "lora_hub.registry.registry",
    }


def test_validate_leaves_the_collector_of_cycles_as_it_was(world, tmp_path, monkeypatch):
    monkeypatch.setenv("LORAHUB_HOME", str(tmp_path / "home"))
    before = gc.get_threshold()

    assert run(["validate", str(world / "package")]) == 0

    assert gc.get_threshold() == before
