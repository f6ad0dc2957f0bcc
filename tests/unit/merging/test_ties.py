"""What is tied in the base and what an adapter says of it, case by case. Whole models with
their logits stand in tests/journeys/test_peft_semantics_merged.py."""

import json

import pytest
import torch
from safetensors.torch import load_file

from lora_hub.errors import FitError
from lora_hub.merging.execute import execute
from lora_hub.merging.plan import Part, plan
from lora_hub.tensors.checkpoint import Checkpoint
from tests.unit.merging.sources import base, source

EMBEDDING = "model.embed_tokens.weight"
ROWS = torch.arange(12.0).reshape(6, 2)


def tied(folder, **config):
    return base(
        folder,
        {EMBEDDING: ROWS, "model.norm.weight": torch.ones(2)},
        **{"architectures": ["XForCausalLM"], "tie_word_embeddings": True} | config,
    )


def random(*shapes):
    torch.manual_seed(0)
    return tuple(torch.randn(shape) for shape in shapes)


def of_embedding(**fields):
    a, b = random((1, 6), (2, 1))
    tensors = {"a": a, "b": b}
    update = ("model.embed_tokens", "a", "b", {"layer": "embedding"})
    return source(tensors, updates=[update], **fields), 3 * (b @ a).T


def of_head(**fields):
    a, b = random((1, 2), (6, 1))
    return source({"a": a, "b": b}, updates=[("lm_head", "a", "b")], **fields), 3 * b @ a


def merged(folder, out, *sources, **options):
    with Checkpoint.open(folder) as checkpoint:
        parts = [Part(one) for one in sources]
        made = plan(checkpoint, parts, **options)
        execute(made, checkpoint, parts, out)
    return load_file(out / "model.safetensors")


def assert_close(found, wanted):
    assert (found - wanted).abs().max() <= 2e-6 * wanted.abs().max()


@pytest.mark.parametrize("make", [of_embedding, of_head])
def test_an_adapter_of_one_use_is_refused_with_two_ways_out(tmp_path, make):
    with pytest.raises(FitError, match="merging would change both alike") as error:
        merged(tied(tmp_path / "base"), tmp_path / "out", make()[0])

    assert error.value.hint == (
        "untie the two in the merge (--untie), or attach the adapter instead"
    )


@pytest.mark.parametrize("make", [of_embedding, of_head])
def test_untying_writes_a_tensor_for_each_use(tmp_path, make):
    adapter, delta = make()
    out = tmp_path / "out"

    after = merged(tied(tmp_path / "base"), out, adapter, untie=True)

    own, other = (
        ("lm_head.weight", EMBEDDING) if make is of_head else (EMBEDDING, "lm_head.weight")
    )
    assert_close(after[own], ROWS + delta)
    assert torch.equal(after[other], ROWS)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    assert (
        json.loads((out / "lorahub-merge.json").read_text())["untied"] == "lm_head.weight"
    )


def test_untying_is_said_where_a_config_of_texts_says_otherwise(tmp_path):
    folder = tied(tmp_path / "base", text_config={"tie_word_embeddings": True})

    merged(folder, tmp_path / "out", of_head()[0], untie=True)

    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["text_config"] == {"tie_word_embeddings": False}


def test_the_plan_says_what_is_untied(tmp_path):
    with Checkpoint.open(tied(tmp_path / "base")) as checkpoint:
        text = str(plan(checkpoint, [Part(of_head()[0])], untie=True))

    assert "new: lm_head.weight 6×2 F32 → F32, 1 of 1 adapters (LoRA)" in text
    assert "untied: lm_head.weight stands beside the embedding" in text


def test_an_adapter_that_ties_its_uses_changes_the_one_tensor_once(tmp_path):
    adapter, delta = of_embedding(ties_weights=True)

    after = merged(tied(tmp_path / "base"), tmp_path / "out", adapter)

    assert_close(after[EMBEDDING], ROWS + delta)
    assert "lm_head.weight" not in after


def test_factors_of_both_uses_that_are_one_change_are_merged_once(tmp_path):
    a, b = random((1, 6), (2, 1))
    adapter = source(
        {"a": a, "b": b, "head.a": b.T.clone(), "head.b": a.T.clone()},
        updates=[
            ("lm_head", "head.a", "head.b"),
            ("model.embed_tokens", "a", "b", {"layer": "embedding"}),
        ],
    )

    after = merged(tied(tmp_path / "base"), tmp_path / "out", adapter)

    assert_close(after[EMBEDDING], ROWS + 3 * (b @ a).T)


def each_by_itself():
    a, b, c, d = random((1, 6), (2, 1), (1, 2), (6, 1))
    adapter = source(
        {"a": a, "b": b, "c": c, "d": d},
        updates=[
            ("lm_head", "c", "d"),
            ("model.embed_tokens", "a", "b", {"layer": "embedding"}),
        ],
        ties_weights=True,
    )
    return adapter, 3 * (b @ a).T, 3 * d @ c


def test_two_uses_that_change_unlike_are_refused_and_can_be_untied(tmp_path):
    adapter, of_rows, of_outputs = each_by_itself()
    folder = tied(tmp_path / "base")

    with pytest.raises(FitError, match="each in its own way"):
        merged(folder, tmp_path / "out", adapter)
    after = merged(folder, tmp_path / "out", adapter, untie=True)

    assert_close(after[EMBEDDING], ROWS + of_rows)
    assert_close(after["lm_head.weight"], ROWS + of_outputs)


def test_new_rows_of_an_embedding_are_for_both_uses(tmp_path):
    adapter = source(
        {"rows": torch.tensor([[8.5, 9.5]])},
        replacements=[(EMBEDDING, "token_delta", "rows", (4,))],
    )
    folder = tied(tmp_path / "base")

    once = merged(folder, tmp_path / "out", adapter)
    twice = merged(folder, tmp_path / "untied", adapter, untie=True)

    wanted = ROWS.clone()
    wanted[4] = torch.tensor([8.5, 9.5])
    assert torch.equal(once[EMBEDDING], wanted)
    assert torch.equal(twice[EMBEDDING], wanted)
    assert torch.equal(twice["lm_head.weight"], wanted)


def whole(head):
    return source(
        {"embedding": ROWS + 1, "head": head},
        replacements=[
            ("lm_head.weight", "modules_to_save", "head", None),
            (EMBEDDING, "modules_to_save", "embedding", None),
        ],
    )


def test_equal_new_tensors_for_both_uses_are_one(tmp_path):
    after = merged(tied(tmp_path / "base"), tmp_path / "out", whole(ROWS + 1))

    assert torch.equal(after[EMBEDDING], ROWS + 1)
    assert "lm_head.weight" not in after


def test_unlike_new_tensors_for_both_uses_need_untying(tmp_path):
    folder = tied(tmp_path / "base")

    with pytest.raises(FitError, match="each in its own way") as error:
        merged(folder, tmp_path / "out", whole(ROWS + 2))
    after = merged(folder, tmp_path / "out", whole(ROWS + 2), untie=True)

    assert error.value.where in {EMBEDDING, "lm_head.weight"}
    assert torch.equal(after[EMBEDDING], ROWS + 1)
    assert torch.equal(after["lm_head.weight"], ROWS + 2)


def test_tied_dora_that_says_one_magnitude_is_refused(tmp_path):
    a, b = random((1, 6), (2, 1))
    fields = {"layer": "embedding", "magnitude": "m"}
    adapter = source(
        {"a": a, "b": b, "m": torch.ones(2)},
        updates=[("model.embed_tokens", "a", "b", fields)],
        ties_weights=True,
    )

    with pytest.raises(FitError, match="DoRA scales each by norms of its own"):
        merged(tied(tmp_path / "base"), tmp_path / "out", adapter)


def test_a_classifier_has_no_head_that_could_be_tied(tmp_path):
    adapter, delta = of_embedding()
    folder = tied(tmp_path / "base", architectures=["XForSequenceClassification"])

    after = merged(folder, tmp_path / "out", adapter)

    assert_close(after[EMBEDDING], ROWS + delta)


def test_untying_what_is_not_tied_changes_nothing(tmp_path):
    adapter, delta = of_embedding()
    folder = tied(tmp_path / "base", tie_word_embeddings=False)

    after = merged(folder, tmp_path / "out", adapter, untie=True)

    assert_close(after[EMBEDDING], ROWS + delta)
    assert "lm_head.weight" not in after


def test_a_model_whose_own_head_is_not_known_cannot_be_untied(tmp_path):
    name = "bert.embeddings.word_embeddings"
    a, b = random((1, 6), (2, 1))
    adapter = source({"a": a, "b": b}, updates=[(name, "a", "b", {"layer": "embedding"})])
    folder = base(
        tmp_path / "base", {f"{name}.weight": ROWS}, architectures=["BertForMaskedLM"]
    )

    with pytest.raises(FitError, match="is not known how a model of this kind"):
        merged(folder, tmp_path / "out", adapter, untie=True)
    with pytest.raises(FitError, match="changes one") as error:
        merged(folder, tmp_path / "out", adapter)
    assert error.value.hint == "attach the adapter instead"


def test_a_base_without_a_config_cannot_say_that_it_is_untied(tmp_path):
    folder = tied(tmp_path / "base")
    (folder / "config.json").unlink()

    with pytest.raises(FitError, match=r"no config\.json that could say"):
        merged(folder, tmp_path / "out", of_head()[0], untie=True)


def test_the_heads_that_untying_writes_are_those_of_transformers():
    """Every embedding whose head we name, in the models that have one of that name."""
    from transformers import (
        BloomForCausalLM,
        GPT2LMHeadModel,
        LlamaForCausalLM,
        OPTForCausalLM,
    )

    from lora_hub.merging.ties import _HEAD_OF

    for model in (LlamaForCausalLM, GPT2LMHeadModel, BloomForCausalLM):
        (tie,) = model._tied_weights_keys.items()
        assert _HEAD_OF[tie[1].removesuffix(".weight")] == tie[0].removesuffix(".weight")
    (other,) = OPTForCausalLM._tied_weights_keys.values()
    assert other.removesuffix(".weight") not in _HEAD_OF  # Whisper's head has another name
