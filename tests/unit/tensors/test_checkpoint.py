"""A checkpoint folder as one table, and folders that are none."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from lora_hub.errors import DocumentError, InputError, LoraHubError, TensorFileError
from lora_hub.tensors.checkpoint import Checkpoint

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
A, B = torch.arange(4.0), torch.ones(2, 3, dtype=torch.bfloat16)


def sharded(folder, weight_map=None):
    folder.mkdir(exist_ok=True)
    save_file({"a": A}, folder / FIRST)
    save_file({"b": B}, folder / SECOND)
    index = {"metadata": {}, "weight_map": weight_map or {"a": FIRST, "b": SECOND}}
    (folder / INDEX).write_text(json.dumps(index))
    return folder


def test_one_file_and_two_shards_give_the_same_table(tmp_path):
    single = tmp_path / "single"
    single.mkdir()
    save_file({"b": B, "a": A}, single / "model.safetensors")

    with Checkpoint.open(single) as one, Checkpoint.open(sharded(tmp_path / "two")) as two:
        for checkpoint in (one, two):
            assert bytes(checkpoint.read("a")) == A.numpy().tobytes()
            assert (
                bytes(checkpoint.read("b", 2, 6))
                == B.view(torch.int16).numpy().tobytes()[2:6]
            )
            assert checkpoint.tensors["b"].shape == (2, 3)
        assert len(one.shards) == 1
        assert [shard.path.name for shard in two.shards] == [FIRST, SECOND]
        assert two.shard_of("b").path.name == SECOND


def test_fills_a_buffer(tmp_path):
    buffer = bytearray(8)

    with Checkpoint.open(sharded(tmp_path)) as checkpoint:
        checkpoint.read_into("a", 8, buffer)

    assert bytes(buffer) == A.numpy().tobytes()[8:]


def test_the_single_file_wins_as_it_does_in_transformers(tmp_path):
    save_file({"only": A}, sharded(tmp_path) / "model.safetensors")

    with Checkpoint.open(tmp_path) as checkpoint:
        assert list(checkpoint.tensors) == ["only"]


def test_reads_the_config_where_there_is_one(tmp_path):
    folder = sharded(tmp_path)

    with Checkpoint.open(folder) as checkpoint:
        assert checkpoint.config == {}
    (folder / "config.json").write_text('{"model_type": "llama"}')
    with Checkpoint.open(folder) as checkpoint:
        assert checkpoint.config == {"model_type": "llama"}


def test_refuses_a_name_it_does_not_hold(tmp_path):
    with (
        Checkpoint.open(sharded(tmp_path)) as checkpoint,
        pytest.raises(InputError, match="holds no tensor 'z'"),
    ):
        checkpoint.read("z")


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": FIRST, "b": SECOND, "c": SECOND}, f"says that {SECOND} holds 'c'"),
        ({"a": FIRST}, None),
        ({"a": SECOND, "b": SECOND}, f"says that {SECOND} holds 'a'"),
        ({"b": SECOND, "c": FIRST}, f"says that {FIRST} holds 'c'"),
        ({"a": FIRST, "b": "../" + SECOND}, "expected the name of a .safetensors file"),
        ({"a": FIRST, "b": "/" + SECOND}, "expected the name of a .safetensors file"),
        ({"a": FIRST, "b": "x\\" + SECOND}, "expected the name of a .safetensors file"),
        (
            {"a": FIRST, "b": "pytorch_model.bin"},
            "expected the name of a .safetensors file",
        ),
        ({"a": FIRST, "b": 2}, "expected the name of a .safetensors file"),
        ({"a": FIRST, "b": [SECOND]}, "expected the name of a .safetensors file"),
        ({"a": FIRST, "b": "gone.safetensors"}, "No such file"),
    ],
)
def test_the_index_must_say_what_the_shards_hold(tmp_path, weight_map, message):
    folder = sharded(tmp_path, weight_map)

    if message is None:  # a shard that the index does not name is never read
        with Checkpoint.open(folder) as checkpoint:
            assert list(checkpoint.tensors) == ["a"]
        return
    with pytest.raises(InputError) as caught:
        Checkpoint.open(folder)
    assert message in caught.value.problem


def test_a_tensor_the_index_does_not_list_is_refused(tmp_path):
    folder = sharded(tmp_path)
    save_file({"b": B, "hidden": A}, folder / SECOND)

    with pytest.raises(DocumentError, match="'hidden', the index says it lies in no file"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "is a list"),
        ("{}", "weight_map is missing"),
        ('{"weight_map": []}', "weight_map is missing or is no object"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "stands twice"),
        ("{", "not JSON"),
    ],
)
def test_refuses_a_malformed_index(tmp_path, text, message):
    (tmp_path / INDEX).write_text(text)

    with pytest.raises(DocumentError, match=message):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ((), "holds neither model.safetensors nor"),
        (("pytorch_model.bin", "config.json"), r"only as a pickle \(pytorch_model.bin\)"),
        (("consolidated.00.pth",), "only as a pickle"),
        (("MODEL.PICKLE",), "only as a pickle"),
        (("adapter_model.safetensors",), "holds neither model.safetensors nor"),
    ],
)
def test_refuses_folders_without_a_checkpoint_by_what_they_hold(tmp_path, files, message):
    for name in files:
        (tmp_path / name).write_bytes(b"{}")

    with pytest.raises(InputError, match=message):
        Checkpoint.open(tmp_path)


def test_refuses_what_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")

    with pytest.raises(InputError, match="there is no such folder"):
        Checkpoint.open(tmp_path / "nothing")
    with pytest.raises(InputError, match="is no folder"):
        Checkpoint.open(tmp_path / "file")
    with pytest.raises(InputError, match="File name too long"):
        Checkpoint.open(tmp_path / ("long" * 100))


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        ("config.json", "{", DocumentError),
        (SECOND, "version https://git-lfs.github.com/spec/v1\noid", TensorFileError),
        (SECOND, "", TensorFileError),
    ],
)
def test_a_broken_file_is_named(tmp_path, name, text, error):
    folder = sharded(tmp_path)
    (folder / name).write_text(text)

    with pytest.raises(LoraHubError) as caught:
        Checkpoint.open(folder)

    assert type(caught.value) is error
    assert name in str(caught.value.where)


def test_a_pipe_as_the_config_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(sharded(tmp_path) / "config.json")

    with pytest.raises(DocumentError, match="no regular file"):
        Checkpoint.open(tmp_path)


def test_a_checkpoint_without_tensors_is_none(tmp_path):
    (tmp_path / INDEX).write_text('{"weight_map": {}}')

    with pytest.raises(InputError, match="holds no tensors"):
        Checkpoint.open(tmp_path)
