import json
import os
import shutil

import pytest

from lora_hub.errors import DocumentError, FormatError, InputError, TensorFileError
from lora_hub.formats.detect import open_adapter, source_from_files
from tests.builders import tensor_bytes, tiny_adapter

LORA = json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}).encode()
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
WEIGHTS = tensor_bytes(
    {
        "base_model.model.x.lora_A.weight": ("F32", (2, 3)),
        "base_model.model.x.lora_B.weight": ("F32", (3, 2)),
    }
)


def test_opens_what_peft_saved(tmp_path):
    folder = tiny_adapter(tmp_path / "adapter", rank=3, alpha=6)

    source = open_adapter(folder)

    assert len(source.updates) == 4
    assert {update.scaling for update in source.updates} == {2.0}


def test_follows_links_as_download_caches_make_them(tmp_path):
    folder = tiny_adapter(tmp_path / "blobs")
    links = tmp_path / "snapshot"
    links.mkdir()
    for path in folder.iterdir():
        (links / path.name).symlink_to(path)

    assert open_adapter(links).updates


def test_reads_files_without_a_folder():
    files = {"adapter_config.json": LORA, "adapter_model.safetensors": WEIGHTS}

    source = source_from_files(files.__getitem__, files, where="blobs")

    assert [update.target for update in source.updates] == ["x"]


def test_never_opens_a_pickle_beside_the_weights():
    files = {"adapter_config.json": LORA, "adapter_model.safetensors": WEIGHTS}

    def read(name):
        assert name in files, f"{name} was read"
        return files[name]

    assert source_from_files(read, [*files, "training_args.bin"], where="blobs").updates


BAD = [
    ({}, FormatError, "no adapter is here"),
    ({"adapter.safetensors": b""}, FormatError, "nobody knows the scaling"),
    ({"adapter_model.bin": b""}, FormatError, "'adapter_model.bin' is a pickle"),
    ({"adapter_config.json": LORA}, FormatError, "no adapter_model.safetensors"),
    (
        {"adapter_config.json": LORA, "adapter_model.bin": b""},
        FormatError,
        "'adapter_model.bin' is a pickle, which can run code",
    ),
    (
        {"adapter_config.json": LORA, "Copy of adapter_model.safetensors": b""},
        FormatError,
        "found 'Copy of adapter_model.safetensors'",
    ),
    (
        {"adapter_config.json": b'{"fine_tune_type":"lora","num_layers":4}'},
        FormatError,
        "the config is MLX-LM's",
    ),
    (
        {"adapter_config.json": b'{"model_class":"X","model_type":"bert","config":{}}'},
        FormatError,
        "the config is AdapterHub's",
    ),
    ({"adapter_config.json": b'{"r":8}'}, FormatError, "it names no peft_type"),
    (
        {"adapter_config.json": b'{"peft_type":"PREFIX_TUNING"}', "adapter_model.bin": b""},
        FormatError,
        "peft_type is 'PREFIX_TUNING'",
    ),
    ({"adapter_config.json": LFS}, DocumentError, "Git LFS pointer"),
    ({"adapter_config.json": b"{"}, DocumentError, "not JSON"),
    ({"adapter_config.json": b'{"r":1,"r":2}'}, DocumentError, "'r' stands twice"),
    (
        {"adapter_config.json": LORA, "adapter_model.safetensors": LFS},
        TensorFileError,
        "Git LFS pointer",
    ),
    (
        {"adapter_config.json": LORA, "adapter_model.safetensors": b"ab"},
        TensorFileError,
        "the file has 2 bytes",
    ),
    (
        {"adapter_config.json": LORA, "adapter_model.safetensors": WEIGHTS + b"x"},
        TensorFileError,
        "1 bytes follow the last tensor",
    ),
]


@pytest.mark.parametrize(("files", "error_class", "problem"), BAD)
def test_what_is_no_adapter_is_refused_by_name(files, error_class, problem, tmp_path):
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)

    with pytest.raises(error_class) as error:
        open_adapter(tmp_path)

    assert problem in error.value.problem
    assert str(tmp_path) in error.value.where


def test_missing_folder_and_file_in_place_of_a_folder_are_told_apart(tmp_path):
    (tmp_path / "file").touch()

    with pytest.raises(InputError, match="no such folder"):
        open_adapter(tmp_path / "nothing")
    with pytest.raises(InputError, match="this is a file"):
        open_adapter(tmp_path / "file")


def test_named_pipe_in_place_of_the_config_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "adapter_config.json")

    with pytest.raises(InputError, match="no regular file"):
        open_adapter(tmp_path)


def test_unreadable_file_is_an_input_error(tmp_path):
    folder = tiny_adapter(tmp_path / "adapter")
    shutil.rmtree(tmp_path / "gone", ignore_errors=True)
    (folder / "adapter_config.json").unlink()
    (folder / "adapter_config.json").symlink_to(tmp_path / "gone")

    with pytest.raises(InputError, match="no regular file"):
        open_adapter(folder)
