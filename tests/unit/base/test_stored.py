"""Weights that a checkpoint keeps under other names than the running model."""

import hashlib

import pytest
import torch

from lora_hub.base.folder import FolderBase
from lora_hub.base.stored import Stored, stored
from lora_hub.manifest.document import BaseConfig


def mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=16,
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=3,
        )
    )


def qwen():
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=16,
            hidden_size=8,
            intermediate_size=12,
            moe_intermediate_size=6,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_experts=4,
            head_dim=4,
        )
    )


@pytest.mark.parametrize("make", [mixtral, qwen])
def test_experts_saved_one_by_one_are_the_fused_weight(tmp_path, make):
    torch.manual_seed(0)
    model = make()
    model.save_pretrained(tmp_path)
    fused = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if ".experts." in name and tensor.dim() == 3
    }

    with FolderBase.open(tmp_path) as view:
        for name, tensor in fused.items():
            place = stored(view.tensors, view.config, name)
            assert place is not None
            assert name not in view.tensors
            assert place.shape == tuple(tensor.shape)
            data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
            assert view.digest(name) == "sha256:" + hashlib.sha256(data).hexdigest()
            narrow = view.digest(name, "BF16")
            assert narrow is None  # random float32 holds values that bfloat16 does not

    assert len(fused) == 2


@pytest.mark.parametrize("make", [mixtral, qwen])
def test_routers_are_found_under_their_names_in_files(tmp_path, make):
    torch.manual_seed(0)
    model = make()
    model.save_pretrained(tmp_path)
    name = "model.layers.0.mlp.gate.weight"

    with FolderBase.open(tmp_path) as view:
        data = model.state_dict()[name].contiguous().view(torch.uint8).numpy().tobytes()

        assert view.digest(name) == "sha256:" + hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"a.experts.0.gate_proj.weight": ("F32", (2, 3))},
        {
            "a.experts.0.gate_proj.weight": ("F32", (2, 3)),
            "a.experts.0.up_proj.weight": ("F32", (3, 3)),
        },
        {
            "a.experts.0.gate_proj.weight": ("F32", (2, 3)),
            "a.experts.0.up_proj.weight": ("F16", (2, 3)),
        },
        {
            "a.experts.0.gate_proj.weight": ("F32", (2,)),
            "a.experts.0.up_proj.weight": ("F32", (2,)),
        },
        {
            "a.experts.0.gate_proj.weight": ("F32", (2, 3)),
            "a.experts.0.up_proj.weight": ("F32", (2, 3)),
            "a.experts.1.gate_proj.weight": ("F32", (2, 3)),
        },
    ],
)
def test_experts_of_which_something_is_missing_or_unlike_are_none(tensors):
    assert stored(tensors, BaseConfig(), "a.experts.gate_up_proj") is None


def test_a_head_is_tied_where_the_config_says_so_or_nothing():
    tensors = {"transformer.wte.weight": ("F32", (8, 2)), "h.weight": ("F32", (2, 2))}

    for tie in (True, None):
        config = BaseConfig(tie_word_embeddings=tie)
        assert stored(tensors, config, "lm_head.weight") == Stored(
            ("transformer.wte.weight",), "F32", (8, 2)
        )
    untied = BaseConfig(tie_word_embeddings=False)
    assert stored(tensors, untied, "lm_head.weight") is None


def test_a_name_that_ends_like_an_embeddings_is_none():
    tensors = {"model.unshared.weight": ("F32", (8, 2))}

    assert stored(tensors, BaseConfig(tie_word_embeddings=True), "lm_head.weight") is None


def test_of_two_embeddings_none_is_the_head():
    tensors = {
        "encoder.embed_tokens.weight": ("F32", (8, 2)),
        "decoder.embed_tokens.weight": ("F32", (8, 2)),
    }

    assert stored(tensors, BaseConfig(), "lm_head.weight") is None


def test_a_prefix_is_passed_over_only_where_the_base_has_none_of_it():
    headless = {"h.0.c_attn.weight": ("F32", (2, 6))}
    mixed = {**headless, "transformer.wte.weight": ("F32", (8, 2))}
    name = "transformer.h.0.c_attn.weight"

    found = stored(headless, BaseConfig(), name)

    assert found is not None
    assert found.parts == ("h.0.c_attn.weight",)
    assert stored(mixed, BaseConfig(), name) is None
