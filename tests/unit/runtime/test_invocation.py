import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_hub.errors import InputError
from lora_hub.runtime.invocation import Invocation, awake_from

MODEL = torch.nn.Module()
rows = st.lists(st.integers(0, 2), min_size=0, max_size=12)


@given(rows, st.lists(st.integers(0, 2), min_size=1, max_size=3))
def test_awake_from_the_last_occurrence_on(row, sequence):
    found = awake_from(torch.tensor([row], dtype=torch.int64), tuple(sequence))

    starts = [
        at for at in range(len(row)) if row[at : at + len(sequence)] == list(sequence)
    ]
    last = starts[-1] if starts else len(row)
    assert found.tolist() == [[at >= last for at in range(len(row))]]


class Cache:
    def __init__(self, length):
        self.length = length

    def get_seq_length(self):
        return self.length


def invocation():
    return Invocation((5, 6), where="mine")


def test_refuses_a_call_without_tokens():
    with pytest.raises(InputError, match="without input_ids") as error:
        invocation().before(MODEL, (), {"inputs_embeds": torch.ones(1, 2, 3)})

    assert error.value.where == "mine"


def test_refuses_a_cache_it_did_not_see():
    with pytest.raises(InputError, match="goes on from a cache"):
        invocation().before(MODEL, (torch.tensor([[1]]),), {"past_key_values": Cache(3)})


def test_refuses_a_part_of_the_model_that_is_called_by_itself():
    with pytest.raises(InputError, match="part of the model was called by itself"):
        invocation().gate(torch.ones(1, 2, 3))


def test_a_layer_that_sees_the_last_tokens_alone_is_gated_there():
    each = invocation()
    each.before(MODEL, (torch.tensor([[5, 6, 1], [1, 5, 6]]),), {})

    gate = each.gate(torch.ones(2, 1, 8))

    assert gate.tolist() == [[[True]], [[True]]]
    assert each.gate(torch.ones(2, 3, 8))[1].tolist() == [[False], [True], [True]]
    assert each.gate(torch.ones(6, 8)).shape == (6, 1)


def test_refuses_an_output_that_does_not_tell_its_tokens():
    each = invocation()
    each.before(MODEL, (torch.tensor([[5, 6, 1]]),), {})

    with pytest.raises(InputError, match="where the adapter acts is not known"):
        each.gate(torch.ones(4, 8))
