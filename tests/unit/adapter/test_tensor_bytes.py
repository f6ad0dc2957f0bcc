import struct

import pytest

from lora_hub.adapter.tensor_bytes import NAMES, TORCH, to_bytes, to_tensor
from lora_hub.tensors.dtypes import BITS


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
