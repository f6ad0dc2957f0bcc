import pytest
import torch

from lora_hub.adapter.layout import from_matrix, to_matrix

LAYOUTS = [
    ("linear", (5, 3), False, (5, 3)),
    ("linear", (3, 5), True, (5, 3)),
    ("embedding", (7, 3), True, (3, 7)),
    ("conv", (4, 2, 3), False, (4, 6)),
    ("conv", (4, 2, 3, 5), False, (4, 30)),
    ("experts", (6, 5, 3), False, (6, 5, 3)),
    ("experts", (6, 3, 5), True, (6, 5, 3)),
    # PEFT takes a parameter of two axes as (out, in), whatever the module says.
    ("experts", (5, 3), False, (1, 5, 3)),
    ("experts", (5, 3), True, (1, 5, 3)),
]


@pytest.mark.parametrize(("layer", "stored", "is_transposed", "matrix"), LAYOUTS)
def test_a_weight_as_a_matrix_and_back_is_itself(layer, stored, is_transposed, matrix):
    weight = torch.randn(stored)

    found = to_matrix(weight, layer, is_transposed=is_transposed)
    back = from_matrix(found, stored, layer, is_transposed=is_transposed)

    assert found.shape == matrix
    assert torch.equal(back, weight)
    assert back.data_ptr() == weight.data_ptr()


def test_a_transposed_weight_is_turned_and_not_reshaped():
    weight = torch.arange(6).reshape(2, 3)

    found = to_matrix(weight, "linear", is_transposed=True)

    assert found.tolist() == [[0, 3], [1, 4], [2, 5]]
