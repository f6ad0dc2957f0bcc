"""loralib's names; the formula is `lora_B @ lora_A · lora_alpha / r` of its Linear."""

import numpy as np
import pytest

from lora_hub.errors import FormatError, LossyConversion
from tests import adapters
from tests.adapters import K0, Q0, part, source
from tests.builders import tensor_bytes

PAIR = {f"{Q0}.lora_A": ("F32", (2, 8)), f"{Q0}.lora_B": ("F32", (8, 2))}


def read(tensors, alpha=4.0):
    files = {"lora.safetensors": tensor_bytes(tensors)}
    return adapters.read_back("loralib", files, alpha=alpha)


def test_delta_is_that_of_loralib():
    wanted = part(Q0, rank=3, alpha=5)

    data = adapters.written("loralib", source(wanted))["lora.safetensors"]

    found = adapters.tensors_of(data)
    a, b = (adapters.float64(*found[f"{Q0}.lora_{which}"]) for which in "AB")
    np.testing.assert_array_equal(5 / 3 * (b @ a), adapters.delta(wanted))


def test_alpha_that_the_file_cannot_hold_is_told():
    from lora_hub.formats.loralib import write

    assert "lora_alpha=5.0" in write(source(part(Q0, alpha=5.0))).notes[0]


def test_alpha_is_the_callers():
    assert read(PAIR, alpha=6).updates[0].scaling == 3.0


BAD = [
    (PAIR, None, "keeps no scaling in the file"),
    (PAIR, float("nan"), "alpha is nan"),
    ({**PAIR, "x.bias": ("F32", (8,))}, 4, "is a bias"),
    ({**PAIR, "x.weight": ("F32", (8, 8))}, 4, "no low-rank factor"),
    (
        {"attn.lora_A": ("F32", (4, 8)), "attn.lora_B": ("F32", (16, 2))},
        4,
        "as of a MergedLinear",
    ),
    (
        {"conv1.lora_A": ("F32", (6, 6)), "conv1.lora_B": ("F32", (6, 6))},
        4,
        "a convolution",
    ),
    ({"wte.lora_A": ("F32", (2, 9)), "wte.lora_B": ("F32", (8, 2))}, 4, "is an embedding"),
    ({f"{Q0}.lora_A": ("F32", (2, 8))}, 4, "not the other factor"),
]


@pytest.mark.parametrize(("tensors", "alpha", "problem"), BAD)
def test_what_is_not_read_is_refused_by_name(tensors, alpha, problem):
    with pytest.raises(FormatError) as error:
        read(tensors, alpha)

    assert problem in error.value.problem


LOSSES = [
    ([part(Q0, alpha=2), part(K0, alpha=4)], "one alpha for all"),
    ([part(Q0, rank=3, alpha=1.6, rule="alpha/sqrt(r)")], "no alpha over the rank"),
]


@pytest.mark.parametrize(("parts", "loss"), LOSSES)
def test_what_loralib_cannot_say_is_refused_with_the_list(parts, loss):
    with pytest.raises(LossyConversion) as error:
        adapters.written("loralib", source(*parts))

    assert loss in error.value.losses[0]
