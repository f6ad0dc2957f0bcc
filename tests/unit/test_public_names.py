"""The public names are real, few, and named in the README."""

import pkgutil
import re
from pathlib import Path

import lora_hub

ROOT = Path(__file__).parents[2]


def test_every_public_name_is_there():
    assert all(hasattr(lora_hub, name) for name in lora_hub.__all__)


def test_no_module_takes_the_place_of_a_public_name():
    modules = {module.name for module in pkgutil.iter_modules(lora_hub.__path__)}

    assert modules.isdisjoint(lora_hub.__all__)


def test_the_readme_names_every_public_name():
    readme = (ROOT / "README.md").read_text()

    missing = [
        name for name in lora_hub.__all__ if name != "__version__" and name not in readme
    ]

    assert missing == []


def test_the_version_stands_in_the_changelog():
    changelog = (ROOT / "CHANGELOG.md").read_text()

    assert re.search(rf"^## {re.escape(lora_hub.__version__)}\b", changelog, re.MULTILINE)
