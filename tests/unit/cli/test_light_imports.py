"""What each command may import: start-up stays light, and packaging needs no torch.

Each command runs in a process of its own that prints the names of the packages it has
loaded; they are compared with a list of what it may load at most.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
REGISTRY = ROOT / "registry"
SHAKESPEARE = "tests/assets/adapters/shakespeare"

# Third-party packages; modules of the standard library and parts of these do not count.
START = {"click", "lora_hub"}
DOCUMENTS = START | {"msgspec", "rfc8785", "packaging", "platformdirs", "typing_extensions"}
SIGNATURES = DOCUMENTS | {"cryptography", "_cffi_backend", "_openssl"}
SCHEMA = {
    *("jsonschema", "jsonschema_specifications", "referencing", "rpds", "attr", "attrs"),
    "idna",
}

CASES = {
    "--version": (["--version"], START),
    "--help": (["--help"], START),
    "validate registry": (["validate", str(REGISTRY)], SIGNATURES | SCHEMA | {"numpy"}),
    "registry check": (["registry", "check", str(REGISTRY)], SIGNATURES),
    "pull": (["pull", "style/milton", "--registry", str(REGISTRY)], SIGNATURES),
    "show": (["show", "style/milton", "--registry", str(REGISTRY)], SIGNATURES),
    "search": (["search", "--registry", str(REGISTRY)], DOCUMENTS),
    "inspect": (
        ["inspect", str(ROOT / "tests/assets/adapters/milton")],
        DOCUMENTS | {"numpy"},
    ),
    "convert": (
        ["convert", str(ROOT / SHAKESPEARE), "--to", "mlx", "--out", "out"],
        DOCUMENTS | {"numpy"},
    ),
    "keygen": (["keygen", "--out", "key"], SIGNATURES),
    "trust list": (["trust", "list"], SIGNATURES),
    "cache list": (["cache", "list"], DOCUMENTS),
}

PROBE = """
import json, sys
before = set(sys.modules)
from lora_hub.cli.main import run
code = run(sys.argv[1:])
loaded = {name.partition(".")[0] for name in set(sys.modules) - before}
print(json.dumps([code, sorted(loaded - set(sys.stdlib_module_names))]))
"""


@pytest.mark.parametrize("case", CASES)
def test_command_loads_only_what_it_may(case, tmp_path, monkeypatch):
    monkeypatch.setenv("LORAHUB_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LORAHUB_CACHE", str(tmp_path / "cache"))
    arguments, allowed = CASES[case]

    result = subprocess.run(
        [sys.executable, "-c", PROBE, *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    code, loaded = json.loads(result.stdout.splitlines()[-1])

    assert code == 0, result.stderr
    # editable installs bring a finder of their own
    assert {name for name in loaded if not name.startswith("__editable__")} <= allowed
