import struct

import pytest
import torch
from safetensors.torch import load, save

from lora_hub.adapter.tensor_bytes import (
    NAMES,
    TORCH,
    all_at_once,
    one_by_one,
    to_bytes,
    to_tensor,
)
from lora_hub.tensors.dtypes import BITS
from lora_hub.tensors.file import TensorFile
from lora_hub.tensors.write import chunks_of


def test_numbers_are_little_endian_and_row_major():
    tensor = to_tensor(struct.pack("<4f", 1, 2, 3, 4), "F32", (2, 2))

    assert tensor.tolist() == [[1, 2], [3, 4]]
    assert bytes(to_bytes(tensor.T)) == struct.pack("<4f", 1, 3, 2, 4)


@pytest.mark.parametrize("name", TORCH)
def test_every_bit_pattern_survives_the_way_there_and_back(name):
    width = BITS[name] // 8
    data = bytes(range(256)) if name != "BOOL" else bytes([0, 1]) * 128

    assert bytes(to_bytes(to_tensor(data, name, (256 // width,)))) == data
    assert TORCH[name].itemsize == width
    assert NAMES[TORCH[name]] == name


def test_the_tensor_has_memory_of_its_own():
    data = bytearray(4)

    tensor = to_tensor(memoryview(data), "F32", (1,))
    data[:] = b"\xff" * 4

    assert tensor.tolist() == [0]


@pytest.mark.parametrize("read", [all_at_once, one_by_one])
def test_tensors_of_a_file_are_those_the_safetensors_library_reads(read):
    made = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).bfloat16(),
        "empty": torch.zeros(0, 4),
        "one": torch.tensor(2.5, dtype=torch.float64),
    }
    data = save(made)

    file = TensorFile.from_bytes(data, where="file")
    tensor = read(file)

    theirs = load(data)
    for name, info in file.header.tensors.items():
        assert torch.equal(tensor(info), theirs[name])
        assert tensor(info).dtype == theirs[name].dtype


def test_numbers_that_lie_at_odd_places_are_read():
    specs = [("a", "U8", (3,)), ("b", "F32", (2,)), ("c", "BF16", (1,)), ("d", "F64", (1,))]
    parts = {
        "a": bytes([1, 2, 3]),
        "b": struct.pack("<2f", 4, 5),
        "c": struct.pack("<f", 6)[2:],
        "d": struct.pack("<d", 7),
    }
    data = b"".join(chunks_of(specs, lambda name: [parts[name]]))
    file = TensorFile.from_bytes(data, where="file")

    tensor = all_at_once(file)

    found = {name: tensor(info).tolist() for name, info in file.header.tensors.items()}
    assert found == {"a": [1, 2, 3], "b": [4, 5], "c": [6], "d": [7]}


def test_a_file_read_all_at_once_is_not_written_to():
    data = save({"a": torch.ones(2)})
    file = TensorFile.from_bytes(data, where="file")

    all_at_once(file)(file.info("a")).zero_()

    assert all_at_once(file)(file.info("a")).tolist() == [1, 1]
    assert one_by_one(file)(file.info("a")).tolist() == [1, 1]
