"""Adapters that wait for their tokens: by rows, in beams, with padding, by cache.

The truth is the same host with one row at a time and without padding, which
`test_peft_semantics.py` compares with PEFT.
"""

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model

import lora_hub
from tests.builders import tiny_model

FIRST, SECOND = (5, 6), (7, 5)
PAD = 0
PROMPTS = torch.tensor(
    [
        [PAD, PAD, 5, 6, 9],
        [1, 7, 5, 6, 8],
        [PAD, 3, 4, 8, 9],
        [5, 6, 7, 5, 2],
    ]
)
SETS = ["first", {"second": 0.5}, "first", {"first": 0.5, "second": -1.0}]
PLAIN = {"do_sample": False, "pad_token_id": PAD, "eos_token_id": None}


def saved(folder, tokens, seed):
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=3,
        lora_alpha=9,
        target_modules=["q_proj", "v_proj", "up_proj"],
        alora_invocation_tokens=list(tokens),
    )
    model = get_peft_model(tiny_model(), config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.5)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    model = tiny_model()
    host = lora_hub.attach(model)
    host.load(saved(folder / "first", FIRST, 1), as_="first")
    host.load(saved(folder / "second", SECOND, 2), as_="second")
    return model, host


def masked(ids):
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


@torch.no_grad()
def alone(model, host, what, prompt, generated):
    """Return logits of the last token, of this row without padding, token by token."""
    real = prompt[prompt != PAD]
    with host.using(what):
        found = model(real[None], use_cache=True)
        cache = found.past_key_values
        for token in generated:
            found = model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            cache = found.past_key_values
    return found.logits[0, -1]


def test_each_row_generates_as_alone_with_padding_and_a_cache(host):
    model, host = host

    with host.rows(SETS):
        found = model.generate(**masked(PROMPTS), max_new_tokens=5, **PLAIN)

    for row, what in enumerate(SETS):
        generated = found[row, 5:].tolist()
        for count, token in enumerate(generated):
            logits = alone(model, host, what, PROMPTS[row], generated[:count])
            assert logits[token] >= logits.max() - 1e-4


def test_beams_of_a_row_are_as_alone(host):
    model, host = host
    asked = {"num_beams": 3, "max_new_tokens": 5, "num_return_sequences": 3, **PLAIN}

    with host.rows(SETS, each=3):
        found = model.generate(**masked(PROMPTS), **asked)

    for row, what in enumerate(SETS):
        real = PROMPTS[row][PROMPTS[row] != PAD][None]
        with host.using(what):
            own = model.generate(**masked(real), **asked)
        mine = found[3 * row : 3 * row + 3, 5:].tolist()
        assert mine == own[:, real.shape[1] :].tolist()


def test_rows_whose_sequence_is_missing_and_bare_rows_are_the_base(host):
    model, host = host
    base = model(**masked(PROMPTS)).logits

    with host.rows(["second", "first", "second", None]):
        found = model(**masked(PROMPTS)).logits

    assert torch.equal(found[[0, 2, 3]], base[[0, 2, 3]])
    assert torch.equal(found[1, :2], base[1, :2])
    assert not torch.allclose(found[1, 2:], base[1, 2:], atol=1e-3)


@torch.no_grad()
def test_rows_moved_inside_of_a_cache_take_their_adapters_waking_along(host):
    model, host = host
    prompts = torch.tensor([[1, 5, 6, 2], [1, 3, 4, 2]])
    order, following = torch.tensor([1, 0]), torch.tensor([[8], [9]])

    with host.using("first"):
        cache = model(prompts, use_cache=True).past_key_values
        cache.reorder_cache(order)
        found = model(following, past_key_values=cache, use_cache=True).logits
        wanted = model(torch.cat([prompts[order], following], 1)).logits[:, -1:]

    assert torch.allclose(found, wanted, atol=1e-5)
