"""The pages in docs/ say what the code says: every field, option, rule and byte."""

import importlib
import json
import re
import tomllib
from pathlib import Path

import click
import msgspec
import pytest

from lora_hub import canonical, errors
from lora_hub.cli import main
from lora_hub.manifest.document import MANIFEST_NAME, Manifest
from lora_hub.manifest.tasks import TASKS
from lora_hub.registry import documents
from lora_hub.registry.registry import blob_path, open_registry
from lora_hub.registry.trust import Pin
from lora_hub.validation.rules import RULES

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"

# Where docs/registry.md tells of a document's fields.
REGISTRY_SECTIONS = {
    "config": documents.RegistryConfig,
    "publish": documents.PublishEvent,
    "yank": documents.YankEvent,
    "unyank": documents.UnyankEvent,
    "keys": documents.KeyEvent,
    "Whose keys count": Pin,
}


def sections(page):
    """Return heading → text of a page."""
    parts = re.split(r"^## (.+)$", (DOCS / page).read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def first_column(text):
    """Return what the rows of a section's tables are about: `name` → rest of the cell."""
    return dict(re.findall(r"^\| `([^`]+)`([^|]*)\|", text, re.MULTILINE))


def json_blocks(page):
    """Return of each block what stands behind `json` in its first line, and the value."""
    blocks = re.findall(
        r"^```json *([^\n]*)\n(.*?)^```",
        (DOCS / page).read_text(),
        re.MULTILINE | re.DOTALL,
    )
    return [(about, json.loads(text)) for about, text in blocks]


def structs(info, path):
    """Yield path → fields of every document inside a type, `base.targets[]`."""
    if isinstance(info, msgspec.inspect.StructType):
        yield (
            path or MANIFEST_NAME,
            {field.encode_name: field.required for field in info.fields},
        )
        for field in info.fields:
            inner = f"{path}.{field.encode_name}" if path else field.encode_name
            yield from structs(field.type, inner)
    elif isinstance(info, msgspec.inspect.UnionType):
        for each in info.types:
            yield from structs(each, path)
    elif isinstance(info, msgspec.inspect.VarTupleType):
        yield from structs(info.item_type, f"{path}[]")


def commands(command, name):
    """Yield name → command of everything that can be run."""
    if isinstance(command, click.Group):
        for part, inner in command.commands.items():
            yield from commands(inner, f"{name} {part}")
    else:
        yield name, command


def loaded(name):
    return importlib.import_module(f"lora_hub.cli.commands.{name}").command


FIELDS = dict(structs(msgspec.inspect.type_info(Manifest), ""))
COMMANDS = {
    name: command
    for first in main.COMMANDS
    for name, command in commands(loaded(first), f"lorahub {first}")
}


@pytest.mark.parametrize("path", FIELDS)
def test_manifest_page_tells_of_every_field_and_no_other(path):
    (text,) = [
        text
        for heading, text in sections("manifest.md").items()
        if path in re.findall(r"`([^`]+)`", heading)
    ]

    told = {field: "!" in mark for field, mark in first_column(text).items()}

    assert told == FIELDS[path]


def test_manifest_page_lists_every_task():
    text = sections("manifest.md")["`task`"]

    listed = re.findall(r"`([a-z-]+)`", text.partition("Hugging Face Hub:")[2])

    assert sorted(listed) == sorted(TASKS)


def test_manifest_page_shows_a_real_manifest():
    registry = open_registry(ROOT / "registry")
    (entry,) = registry.versions("style/shakespeare")
    real = json.loads((ROOT / "registry" / blob_path(entry.package)).read_bytes())
    del real["base"]["targets"][1:], real["adapter"]["modules"][1:]

    ((_, shown),) = json_blocks("manifest.md")

    assert shown == real


@pytest.mark.parametrize("heading", REGISTRY_SECTIONS)
def test_registry_page_tells_of_every_field_and_no_other(heading):
    document = REGISTRY_SECTIONS[heading]
    tag = document.__struct_config__.tag_field
    fields = {field.encode_name for field in msgspec.structs.fields(document)}

    told = first_column(sections("registry.md")[heading]).keys()

    assert told == fields | ({tag} if tag else set())


def test_registry_page_shows_the_bytes_of_real_files():
    shown = dict(json_blocks("registry.md"))

    assert len(shown) == 3
    for path, value in shown.items():
        assert canonical.encode(value) == (ROOT / path).read_bytes(), path


def test_cli_page_has_a_section_for_every_command_and_no_other():
    told = {heading for heading in sections("cli.md") if heading.startswith("lorahub ")}

    assert told == COMMANDS.keys()


@pytest.mark.parametrize("name", COMMANDS)
def test_cli_page_tells_of_every_option_and_no_other(name):
    options = {
        parameter.opts[0]: parameter.required
        for parameter in COMMANDS[name].params
        if isinstance(parameter, click.Option)
    }

    told = {
        spelling.split()[0]: "!" in mark
        for spelling, mark in first_column(sections("cli.md")[name]).items()
    }

    assert told == options


def test_cli_page_tells_of_every_rule():
    text = sections("cli.md")["lorahub validate"]

    told = dict(re.findall(r"^\| (LH\d+) \| (\w+) \|", text, re.MULTILINE))

    assert told == {rule: row.severity for rule, row in RULES.items()}


def test_cli_page_tells_of_every_variable():
    sources = (path.read_text() for path in (ROOT / "lora_hub").rglob("*.py"))
    read = {name for text in sources for name in re.findall(r"LORAHUB_[A-Z]+", text)}

    told = first_column(sections("cli.md")["Variables"]).keys()

    assert told - {"SOURCE_DATE_EPOCH"} == read


def test_cli_page_tells_of_every_exit_code():
    raised = {
        error.exit_code
        for error in vars(errors).values()
        if isinstance(error, type) and issubclass(error, errors.LoraHubError)
    }

    told = re.findall(r"^\| (\d+) \|", sections("cli.md")["Exit codes"], re.MULTILINE)

    ours = {0, 1, main.BUG, main.INTERRUPTED, main.UNREAD}
    assert {int(code) for code in told} == raised | ours


PAGES = ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"]
PAGES += [f"docs/{path.name}" for path in sorted(DOCS.glob("*.md"))]


@pytest.mark.parametrize("page", PAGES)
def test_page_names_only_files_and_pages_that_are_there(page):
    text = (ROOT / page).read_text()
    held = [
        f"/{path.relative_to(ROOT).as_posix()}"
        for folder in ("lora_hub", "tests", "examples", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
    ]

    named = set(re.findall(r"`((?:\w+/)*\w+\.py)`", text))
    linked = re.findall(r"\]\(([\w/]+\.md)", text)

    lost = {name for name in named if not any(path.endswith(f"/{name}") for path in held)}
    assert lost == set()
    assert [
        link for link in linked if not (ROOT / page).parent.joinpath(link).is_file()
    ] == []


def test_every_part_of_the_house_is_drawn_and_stands_in_a_layer():
    house = sections("../ARCHITECTURE.md")["The house"]
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    parts = {
        path.name
        for path in (ROOT / "lora_hub").iterdir()
        if path.is_dir() or path.suffix == ".py"
    } - {"__init__.py", "__pycache__"}

    drawn = set(re.findall(r"\w+(?:\.py|(?=/))", house)) - {"lora_hub"}
    layered = re.findall(r"lora_hub\.(\w+)", " ".join(contract["contracts"][0]["layers"]))

    assert parts <= drawn
    assert sorted(layered) == sorted(part.removesuffix(".py") for part in parts)
