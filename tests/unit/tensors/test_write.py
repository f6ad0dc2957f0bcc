"""Streaming writing: the library reads it, and a tensor gets exactly its bytes."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file

from lora_hub.errors import TensorFileError
from lora_hub.tensors.file import TensorFile
from lora_hub.tensors.write import chunks_of, write_tensors

ADAPTERS = Path(__file__).parents[2] / "assets" / "adapters"
SPECS = [("b", "BF16", (2, 3)), ("a", "F32", (2,)), ("none", "I64", (0, 4))]
CONTENT = {
    "b": torch.arange(6, dtype=torch.bfloat16).view(torch.int16).numpy().tobytes(),
    "a": torch.tensor([1.5, -2.0]).numpy().tobytes(),
    "none": b"",
}


def test_the_library_reads_the_same_tensors(tmp_path):
    path = tmp_path / "new" / "x.safetensors"

    write_tensors(path, SPECS, lambda name: [CONTENT[name]])

    found = load_file(path)
    assert torch.equal(found["b"], torch.arange(6, dtype=torch.bfloat16).reshape(2, 3))
    assert torch.equal(found["a"], torch.tensor([1.5, -2.0]))
    assert found["none"].shape == (0, 4)


def test_tensors_lie_in_the_given_order(tmp_path):
    path = tmp_path / "x.safetensors"

    write_tensors(path, SPECS, lambda name: [CONTENT[name]], metadata={"a": "1"})

    with TensorFile.open(path) as file:
        assert list(file.header.tensors) == ["b", "a", "none"]
        assert file.header.metadata == {"a": "1"}


def test_one_buffer_may_serve_all_pieces(tmp_path):
    path = tmp_path / "x.safetensors"
    buffer = bytearray(4)

    def pieces(name):
        for start in range(0, len(CONTENT[name]), 4):
            buffer[:] = CONTENT[name][start : start + 4]
            yield memoryview(buffer)

    write_tensors(path, SPECS, pieces)

    with TensorFile.open(path) as file:
        assert {name: bytes(file.read(name)) for name in CONTENT} == CONTENT


@pytest.mark.parametrize("name", ["shakespeare", "milton"])
def test_copies_a_real_adapter_byte_for_byte(name):
    data = (ADAPTERS / name / "adapter_model.safetensors").read_bytes()
    file = TensorFile.from_bytes(data, where=name)
    by_name = sorted(file.header.tensors.values(), key=lambda info: info.name)

    specs = [(info.name, info.dtype, info.shape) for info in by_name]
    copy = b"".join(bytes(chunk) for chunk in chunks_of(specs, file.chunks))

    assert copy == data
    assert load(copy).keys() == file.header.tensors.keys()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([bytes(8), bytes(3)], "11 of the 12 bytes were given"),
        ([], "0 of the 12 bytes were given"),
        ([bytes(12), b"x"], "more than the 12 bytes were given"),
    ],
)
def test_refuses_another_number_of_bytes(tmp_path, given, message):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"what was there")

    with pytest.raises(TensorFileError, match=message) as caught:
        write_tensors(path, SPECS, lambda name: given if name == "b" else [CONTENT[name]])

    assert caught.value.where == "b"
    assert path.read_bytes() == b"what was there"
    assert list(tmp_path.iterdir()) == [path]
