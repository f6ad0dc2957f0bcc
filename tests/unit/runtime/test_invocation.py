"""Where an aLoRA acts is known for each row, by the tokens of the call or by its cache."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_hub.errors import InputError
from lora_hub.runtime.invocation import Invocations, awake_from, gate, sequences_of

SEQUENCE = (5, 6)
MINE = {SEQUENCE: "mine"}
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
    """A cache as models have them: it tells its length and moves its rows."""

    def __init__(self, length=3, rows=2):
        self.length = length
        self.rows = list(range(rows))

    def get_seq_length(self):
        return self.length

    def reorder_cache(self, beam_idx):
        self.rows = [self.rows[at] for at in beam_idx.tolist()]

    def batch_repeat_interleave(self, repeats):
        self.rows = [row for row in self.rows for _ in range(repeats)]


class Output:
    def __init__(self, cache):
        self.past_key_values = cache


PROMPTS = torch.tensor([[1, 2, 3], [1, 5, 6]])  # the second one wakes it
NEXT = torch.tensor([[7], [7]])


def after(prompts=PROMPTS, sequences=MINE):
    """Return what has seen the prompts, and the cache that holds them."""
    invocations, cache = Invocations(), Cache()
    seen = invocations.seen(sequences, (prompts,), {})
    invocations.keep(seen, Output(cache))
    return invocations, cache


def goes_on(invocations, cache, tokens=NEXT, sequences=MINE):
    given = {"input_ids": tokens, "past_key_values": cache}
    return invocations.seen(sequences, (), given)


def test_refuses_a_call_without_tokens():
    with pytest.raises(InputError, match="without input_ids") as error:
        Invocations().seen(MINE, (), {"inputs_embeds": torch.ones(1, 2, 3)})

    assert error.value.where == "mine"


@pytest.mark.parametrize("cache", [Cache(), (torch.ones(1),)], ids=["unseen", "tuple"])
def test_refuses_a_cache_it_did_not_see(cache):
    with pytest.raises(InputError, match="goes on from a cache"):
        goes_on(Invocations(), cache)


def test_refuses_a_cache_of_other_rows():
    with pytest.raises(InputError, match="with other rows"):
        goes_on(*after(), tokens=NEXT[:1])


def test_nothing_is_asked_of_a_call_where_no_adapter_waits():
    assert Invocations().seen({}, (), {"inputs_embeds": torch.ones(1, 2, 3)}) == {}


def test_an_empty_cache_is_as_none():
    found = goes_on(Invocations(), Cache(length=0), tokens=PROMPTS)

    assert found[SEQUENCE].tolist() == [[False] * 3, [False, True, True]]


def test_who_was_awake_stays_so_and_what_follows_is_not_searched():
    invocations, cache = after()

    found = goes_on(invocations, cache, tokens=torch.tensor([[5, 6], [1, 1]]))

    assert found[SEQUENCE].tolist() == [[False, False], [True, True]]


def test_each_sequence_wakes_its_own():
    both = sequences_of([("one", SEQUENCE), ("plain", ()), ("two", (1, 2)), ("x", (1, 2))])

    found = goes_on(*after(sequences=both), sequences=both)

    assert both == {SEQUENCE: "one", (1, 2): "two"}
    assert found[SEQUENCE].tolist() == [[False], [True]]
    assert found[1, 2].tolist() == [[True], [False]]


def test_a_second_adapter_does_not_go_on_from_a_cache_of_the_first():
    with pytest.raises(InputError, match="goes on from a cache") as error:
        goes_on(*after(), sequences={(1, 2): "two"})

    assert error.value.where == "two"


def test_rows_that_are_moved_inside_of_the_cache_are_followed():
    invocations, cache = after()

    cache.reorder_cache(torch.tensor([1, 0]))

    assert cache.rows == [1, 0]
    assert goes_on(invocations, cache)[SEQUENCE].tolist() == [[True], [False]]
    cache.batch_repeat_interleave(2)
    again = goes_on(invocations, cache, tokens=NEXT.repeat(2, 1))
    assert again[SEQUENCE].tolist() == [[True], [True], [False], [False]]


def test_a_copy_of_a_cache_moves_its_own_rows():
    invocations, cache = after()

    copy.deepcopy(cache).reorder_cache(torch.tensor([1, 0]))

    assert cache.rows == [0, 1]
    assert goes_on(invocations, cache)[SEQUENCE].tolist() == [[False], [True]]


def test_a_layer_that_sees_the_last_tokens_alone_is_gated_there():
    awake = awake_from(torch.tensor([[5, 6, 1], [1, 5, 6]]), SEQUENCE)

    found = gate(awake, torch.ones(2, 1, 8), where="mine")

    assert found.tolist() == [[[True]], [[True]]]
    three = gate(awake, torch.ones(2, 3, 8), where="mine")
    assert three[1].tolist() == [[False], [True], [True]]
    assert gate(awake, torch.ones(6, 8), where="mine").shape == (6, 1)


def test_refuses_an_output_that_does_not_tell_its_tokens():
    awake = awake_from(torch.tensor([[5, 6, 1]]), SEQUENCE)

    with pytest.raises(InputError, match="where the adapter acts is not known"):
        gate(awake, torch.ones(4, 8), where="mine")
