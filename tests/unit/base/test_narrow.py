"""Values that were widened, recognised; torch is the oracle."""

import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_hub.base.narrow import narrow
from lora_hub.base.view import WIDER

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}
PAIRS = [(wide, to) for to, wider in WIDER.items() for wide in sorted(wider)]


def bytes_of(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(torch.uint8).numpy().tobytes())


@pytest.mark.parametrize(("wide", "to"), PAIRS)
def test_gives_back_every_value_that_was_widened(wide, to):
    if to == "F32":
        numbers = torch.randn(4096)
    else:  # every bit pattern, NaN payloads of quiet kind included
        numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(DTYPES[to])
        numbers = numbers.to(DTYPES[wide]).to(DTYPES[to])
    edges = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.finfo(DTYPES[to]).max])
    numbers = torch.cat([numbers, edges.to(DTYPES[to])])

    found = narrow(bytes_of(numbers.to(DTYPES[wide])), wide, to)

    assert found == bytes_of(numbers)


@pytest.mark.parametrize(("wide", "to"), PAIRS)
def test_tells_one_value_that_does_not_survive(wide, to):
    numbers = torch.ones(100, dtype=DTYPES[wide])
    numbers[57] = 1 + torch.finfo(DTYPES[wide]).eps

    assert narrow(bytes_of(numbers), wide, to) is None


@pytest.mark.parametrize(("wide", "to"), [("F32", "F16"), ("F64", "F32"), ("F64", "F16")])
def test_tells_values_beyond_the_range(wide, to):
    numbers = torch.tensor([torch.finfo(DTYPES[wide]).max], dtype=DTYPES[wide])

    assert narrow(bytes_of(numbers), wide, to) is None


def test_the_empty_tensor_is_exact():
    assert narrow(memoryview(b""), "F32", "BF16") == b""


@given(
    st.lists(
        st.integers(0, 2**16 - 1).map(lambda half: half << 16)
        | st.integers(0, 2**32 - 1)
        | st.sampled_from([0, 1 << 31, 0x7F800000, 0x7FC00001, 0x7F810000, 1]),
        max_size=20,
    )
)
def test_bf16_is_found_where_every_lower_half_is_zero_and_nowhere_else(words):
    found = narrow(memoryview(struct.pack(f"<{len(words)}I", *words)), "F32", "BF16")

    if any(word & 0xFFFF for word in words):
        assert found is None
    else:
        assert found == struct.pack(f"<{len(words)}H", *(word >> 16 for word in words))
