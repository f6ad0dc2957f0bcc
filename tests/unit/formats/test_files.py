"""Opening a folder: nothing that is too large or untrue is read."""

import json
import os
import tracemalloc

import pytest

from lora_hub.errors import FormatError, InputError, LoraHubError, TensorFileError
from lora_hub.formats.detect import open_adapter

CONFIG = json.dumps({"peft_type": "LORA", "r": 2}).encode()
HUGE = 60 * 10**9


def sparse(path, size, head=b""):
    """Make a file of that size which takes no room on the disk."""
    with path.open("wb") as stream:
        stream.write(head)
        stream.truncate(size)


def header(size):
    """Return the first 512 bytes of a file whose one tensor fills the rest."""
    left = size - 512
    entry = {"dtype": "U8", "shape": [left], "data_offsets": [0, left]}
    text = json.dumps({"base_model.model.x.lora_A.weight": entry}).encode()
    return (504).to_bytes(8, "little") + text.ljust(504)


@pytest.mark.parametrize(
    ("name", "head", "problem"),
    [
        ("adapter_model.safetensors", b"", "header"),
        ("adapter_model.safetensors", header(HUGE), "at most 17179869184 are read"),
        ("adapter_config.json", b"{}", "at most 16777216 are read"),
    ],
)
def test_huge_sparse_file_is_refused_without_being_read(name, head, problem, tmp_path):
    (tmp_path / "adapter_config.json").write_bytes(CONFIG)
    sparse(tmp_path / name, HUGE, head)
    tracemalloc.start()

    with pytest.raises(InputError) as error:
        open_adapter(tmp_path)

    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert problem in error.value.problem
    assert peak < 20 << 20


def test_huge_gguf_is_refused_without_being_read(tmp_path):
    sparse(tmp_path / "adapter.gguf", HUGE, b"GGUF")

    with pytest.raises(InputError, match="at most 17179869184 are read"):
        open_adapter(tmp_path)


def test_pointer_of_git_lfs_is_named_without_a_config_too(tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
    (tmp_path / "lora.safetensors").write_bytes(pointer)

    with pytest.raises(TensorFileError, match="Git LFS pointer"):
        open_adapter(tmp_path)


def test_adapters_in_folders_of_it_are_named_in_the_hint(tmp_path):
    for name in ("checkpoint-10", "checkpoint-20"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_bytes(CONFIG)

    with pytest.raises(FormatError) as error:
        open_adapter(tmp_path)

    assert error.value.hint.endswith("give one: checkpoint-10, checkpoint-20")


def test_several_files_beside_a_config_are_named(tmp_path):
    (tmp_path / "adapter_config.json").write_bytes(CONFIG)
    for name in ("model.safetensors", "Copy of adapter_model.safetensors"):
        (tmp_path / name).touch()

    with pytest.raises(FormatError) as error:
        open_adapter(tmp_path)

    assert "'Copy of adapter_model.safetensors', 'model.safetensors'" in error.value.problem
    assert "rename it to adapter_model.safetensors" in error.value.hint


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_pipes_do_not_hang(name, tmp_path):
    (tmp_path / "adapter_config.json").write_bytes(CONFIG)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)

    with pytest.raises(LoraHubError, match="no regular file"):
        open_adapter(tmp_path)
