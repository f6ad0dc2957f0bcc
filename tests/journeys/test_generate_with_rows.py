"""`model.generate` inside `host.rows`: every prompt is continued as it would be alone.

The truth is transformers itself on a float64 model with the dense changes in its weights
(`tests/dense.py`), one prompt at a time, without padding. In float64 no two tokens are so
close that another order of sums would choose another one.
"""

import json

import pytest
import torch
from transformers import GenerationConfig

import lora_hub
from lora_hub.errors import InputError
from tests.builders import tiny_adapter, tiny_model
from tests.dense import put_in

NEW = 6
PAD = 0
PROMPTS = [[5, 9, 14], [7, 3, 11, 20, 30], [8], [21, 22]]
ENTRIES = ["verse", None, {"verse": 0.5, "prose": -1.5}, "scaled"]
ADAPTERS = {
    "verse": {"rank": 2, "alpha": 5},
    "prose": {"rank": 3, "alpha": 4, "targets": ("q_proj", "k_proj", "up_proj"), "seed": 2},
    "scaled": {"rank": 1, "targets": ("o_proj", "down_proj"), "use_dora": True, "seed": 3},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for name, fields in ADAPTERS.items():
        folder = tmp_path_factory.mktemp(name)
        made[name] = tiny_adapter(folder / name, **fields)
    return made


def base():
    """Return a model that never ends a text, so that all rows make as many tokens."""
    model = tiny_model(dtype="float64")
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    return model


@pytest.fixture
def attached(folders):
    model = base()
    host = lora_hub.attach(model)
    for name, folder in folders.items():
        host.load(folder, as_=name)
    return model, host


def truth(folders, entry):
    """Return a model with an entry's changes in its weights: the sum of what each makes."""
    model = base()
    named = {} if entry is None else {entry: 1.0} if isinstance(entry, str) else entry
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, weight in named.items():
        config = json.loads((folders[name] / "adapter_config.json").read_text())
        alone = put_in(base(), folders[name], config).state_dict()
        with torch.no_grad():
            for key, tensor in model.state_dict().items():
                tensor.add_(alone[key] - before[key], alpha=weight)
    return model


def config(**fields):
    plain = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": PAD}
    return GenerationConfig(**plain | fields, bos_token_id=1)


def padded(prompts):
    """Return the prompts as one batch, filled up on the left, and its mask."""
    length = max(map(len, prompts))
    tokens = torch.tensor([[PAD] * (length - len(each)) + each for each in prompts])
    mask = torch.tensor([[0] * (length - len(each)) + [1] * len(each) for each in prompts])
    return {"input_ids": tokens, "attention_mask": mask}


def continued(model, prompts, **fields):
    inputs = padded(prompts)
    whole = model.generate(**inputs, generation_config=config(**fields))
    return whole[:, inputs["input_ids"].shape[1] :].tolist()


def alone(folders, prompts=PROMPTS, entries=ENTRIES, **fields):
    return [
        made
        for prompt, entry in zip(prompts, entries, strict=True)
        for made in continued(truth(folders, entry), [prompt], **fields)
    ]


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({}, id="greedy"),
        pytest.param({"use_cache": False}, id="without a cache"),
        pytest.param({"cache_implementation": "static"}, id="with a cache of fixed size"),
        pytest.param({"repetition_penalty": 1.3}, id="with a penalty"),
    ],
)
def test_each_prompt_is_continued_as_alone(folders, attached, fields):
    model, host = attached
    one_by_one = {**fields, "cache_implementation": None}

    with host.rows(ENTRIES):
        found = continued(model, PROMPTS, **fields)

    assert found == alone(folders, **one_by_one)
    assert len({tuple(each) for each in found}) == len(found)  # no two alike by chance


@pytest.mark.parametrize("returned", [1, 3])
def test_beams_of_a_prompt_use_its_entry(folders, attached, returned):
    model, host = attached
    fields = {"num_beams": 3, "num_return_sequences": returned}

    with host.rows(ENTRIES, each=3):
        found = continued(model, PROMPTS, **fields)

    assert found == alone(folders, **fields)


def test_several_samples_of_a_prompt_use_its_entry(folders, attached):
    model, host = attached
    fields = {"do_sample": True, "top_k": 1, "num_return_sequences": 2}

    with host.rows(ENTRIES, each=2):
        found = continued(model, PROMPTS, **fields)

    assert found == alone(folders, **fields)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_forward_with_padding_is_that_of_each_row(folders, attached, mode):
    model, host = attached
    inputs = padded(PROMPTS)
    places = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)

    with mode(), host.rows(ENTRIES):
        found = model(**inputs, position_ids=places).logits

    for row, (prompt, entry) in enumerate(zip(PROMPTS, ENTRIES, strict=True)):
        with torch.no_grad():
            wanted = truth(folders, entry)(torch.tensor([prompt])).logits[0]
        # Some hundred float64 operations, attention over padded places among them.
        assert torch.allclose(found[row, -len(prompt) :], wanted, rtol=0, atol=1e-12)


def test_one_entry_for_several_beams_is_asked_for_by_name(attached):
    model, host = attached

    with host.rows(ENTRIES), pytest.raises(InputError) as caught:
        continued(model, PROMPTS, num_beams=3)

    assert "4" in str(caught.value)
    assert "12" in str(caught.value)
    assert "each=" in str(caught.value.hint)


def test_a_batch_of_other_rows_is_refused_and_the_host_goes_on(folders, attached):
    model, host = attached

    with pytest.raises(InputError), host.rows(ENTRIES):
        continued(model, PROMPTS[:3])

    with host.rows(ENTRIES[:2]):
        found = continued(model, PROMPTS[:2])
    assert found == alone(folders, PROMPTS[:2], ENTRIES[:2])


def test_a_swap_between_two_texts_is_seen_by_the_second(folders, attached):
    model, host = attached

    with host.rows(["verse", "verse"]):
        first = continued(model, PROMPTS[:2])
        host.swap("verse", folders["prose"])
        second = continued(model, PROMPTS[:2])

    assert first == alone(folders, PROMPTS[:2], ["verse", "verse"])
    assert second == alone(folders, PROMPTS[:2], ["prose", "prose"])
