import pytest
import torch

from lora_hub.adapter.update import Update, delta
from lora_hub.errors import ComposeError


def update(**fields):
    plain = {
        "a": torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 1.0]]),
        "b": torch.tensor([[1.0, 0.0], [0.0, 2.0]]),
        "scaling": torch.tensor([3.0, -1.0], dtype=torch.float64),
    }
    return Update(**plain | fields)


def vector(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def test_delta_scales_each_row_of_a():
    assert delta(update()).tolist() == [[3.0, 6.0, 0.0], [0.0, -2.0, -2.0]]


def test_delta_of_some_rows_is_those_rows_of_the_delta():
    weight = torch.arange(6.0).reshape(2, 3)
    whole = update(p=vector(1, 2), q=vector(1, 0, -1))

    assert torch.equal(delta(whole, weight[1:], rows=slice(1, 2)), delta(whole, weight)[1:])


def test_p_scales_rows_and_q_columns_of_the_weight():
    nothing = update(scaling=vector(0, 0), p=vector(10, 0), q=vector(0, 0, 1))
    weight = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])

    assert delta(nothing, weight).tolist() == [[10, 20, 33], [0, 0, 6]]


def test_delta_that_depends_on_the_weight_asks_for_it():
    with pytest.raises(ComposeError, match="depends on the base weight"):
        delta(update(p=vector(1, 1)))


def test_scaled_multiplies_every_term_and_shares_the_factors():
    whole = update(p=vector(1, 2), q=vector(1, 2, 3), bias=vector(5, 6))

    half = whole.scaled(-0.5)

    assert half.a is whole.a
    assert half.b is whole.b
    assert half.scaling.tolist() == [-1.5, 0.5]
    assert half.p.tolist() == [-0.5, -1]
    assert half.q.tolist() == [-0.5, -1, -1.5]
    assert half.bias.tolist() == [-2.5, -3]


def test_refuses_a_weight_that_overflows_float64():
    with pytest.raises(ComposeError, match="float64 cannot hold"):
        update().scaled(1e308)


def test_annotations_refuse_factors_of_unlike_ranks():
    with pytest.raises(Exception, match="scaling"):
        update(scaling=vector(1, 2, 3))
