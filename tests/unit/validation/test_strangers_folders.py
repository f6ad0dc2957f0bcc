"""A folder of strangers: links that lead out of it, and files that name code to run."""

import json
import shutil
from pathlib import Path

import pytest

from lora_hub.public.packaging import validate

ADAPTER = Path(__file__).parents[2] / "assets/adapters/shakespeare"


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(ADAPTER, tmp_path / "adapter")


def rules(folder):
    return [(one.rule, Path(one.where.partition("#")[0]).name) for one in validate(folder)]


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "adapter_model.safetensors", "README.md", "LICENSE"]
)
def test_link_out_of_the_folder_is_an_error(name, folder, tmp_path):
    good = (folder / name).read_bytes() if (folder / name).exists() else b"text"
    (tmp_path / name).write_bytes(good)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(f"../{name}")

    assert ("LH080", name) in rules(folder)


@pytest.mark.slow
def test_flood_of_files_hides_no_link(folder, tmp_path):
    for number in range(10_001):
        (folder / f"{number:05}").touch()
    shutil.move(folder / "adapter_config.json", tmp_path)
    (folder / "adapter_config.json").symlink_to("../adapter_config.json")

    assert ("LH080", "adapter_config.json") in rules(folder)


def test_snapshot_in_a_download_cache_has_no_finding_of_its_links(tmp_path):
    snapshot = tmp_path / "models--tiny-lab--verse/snapshots/0123"
    snapshot.mkdir(parents=True)
    blobs = snapshot.parents[1] / "blobs"
    blobs.mkdir()
    for path in ADAPTER.iterdir():
        shutil.copy(path, blobs / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")

    assert rules(snapshot) == rules(ADAPTER)


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}),
        '{"auto_map": {}, "auto_map": {"AutoTokenizer": "evil.Tokenizer"}}',
        '{"a": NaN, "auto_map": {"AutoTokenizer": "evil.Tokenizer"}}',
        '{"\\u0061uto_map": {"AutoTokenizer": "evil.Tokenizer"}}',
    ],
)
def test_tokenizer_that_names_code_is_an_error_however_it_is_spelt(text, folder):
    (folder / "tokenizer_config.json").write_text(text)

    assert ("LH081", "tokenizer_config.json") in rules(folder)


def test_tokenizer_that_names_none_is_fine(folder):
    (folder / "tokenizer_config.json").write_text(
        '{"auto_map": {}, "model_max_length": 64}'
    )

    assert rules(folder) == rules(ADAPTER)
