"""Packages that are alike: what is remembered of one never speaks for another."""

import json
import shutil

import pytest

from lora_hub import canonical, digest
from lora_hub.signing import keys
from lora_hub.validation.run import validate
from tests.builders import sign_package, tiny_package

KEY = keys.generate()

TIMES = 4  # what is found is remembered from its second time on, step by step


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("LORAHUB_HOME", str(tmp_path / "home"))


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return sign_package(tiny_package(tmp_path_factory.mktemp("alike") / "verse"), KEY)


@pytest.fixture
def folder(original, tmp_path):
    for _ in range(TIMES):
        assert rules(original) == ["LH043"]
    return shutil.copytree(original, tmp_path / "other")


def rules(folder):
    return [one.rule for one in validate(folder)]


def edit_manifest(folder, change):
    path = folder / "lorahub.json"
    value = json.loads(path.read_text())
    change(value)
    path.write_bytes(canonical.encode(value))


def edit_config(folder, **changes):
    """Change the config, and what the manifest says of its bytes."""
    path = folder / "adapter_config.json"
    path.write_bytes(canonical.encode(json.loads(path.read_text()) | changes))
    restate(folder, path)


def edit_weights(folder, change):
    path = folder / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)
    restate(folder, path)


def restate(folder, path):
    data = path.read_bytes()

    def change(value):
        for file in value["files"]:
            if file["path"] == path.name:
                file |= {"size": len(data), "sha256": digest.of_bytes(data)}

    edit_manifest(folder, change)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda value: value.update(novel=1), "LH004"),
        (lambda value: value["base"].update(novel=1), "LH004"),
        (lambda value: value.update(created="yesterday"), "LH002"),
        (lambda value: value.pop("created"), "LH002"),
        (lambda value: value.update(kind="dora"), "LH022"),
        (lambda value: value["base"]["targets"].pop(), "LH005"),
        (lambda value: value["adapter"]["modules"].pop(), "LH005"),
        (lambda value: value["adapter"]["modules"][0].update(alpha=3), "LH022"),
        (lambda value: value["adapter"]["summary"].update(layers=99), "LH022"),
    ],
)
def test_a_fault_in_a_manifest_is_found_behind_one_that_is_alike(folder, change, rule):
    edit_manifest(folder, change)

    assert rule in rules(folder)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"r": True}, "LH021"),
        ({"use_dora": True}, "LH021"),
        ({"use_rslora": True}, "LH022"),
        ({"lora_alpha": 3}, "LH022"),
        ({"target_modules": ["nobody"]}, "LH021"),
        ({"base_model_name_or_path": "/home/me/base"}, "LH024"),
    ],
)
def test_a_fault_in_a_config_is_found_behind_one_that_is_alike(folder, changes, rule):
    edit_config(folder, **changes)

    assert rule in rules(folder)


def test_numbers_are_looked_at_behind_a_header_that_is_known(folder):
    def change(data):
        data[-4:] = b"\x00\x00\xc0\x7f"

    edit_weights(folder, change)

    assert "LH030" in rules(folder)


def test_a_name_that_stands_twice_is_found_behind_a_beginning_that_is_known(folder):
    path = folder / "lorahub.json"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + b',"zz":1,"zz":1}')

    assert "LH001" in rules(folder)


def test_a_second_adapter_behind_a_beginning_that_is_known_is_found(folder):
    path = folder / "lorahub.json"
    data = path.read_bytes()
    path.write_bytes(data.replace(b',"created":', b',"created":"","adapter":1,"created":'))

    assert "LH001" in rules(folder)
