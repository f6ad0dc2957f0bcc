"""Adapters that meet in one layer: each acts as it would alone, attached and merged.

The truth is dense, in float64: the base, and for each adapter its weight times what it
alone makes of every tensor. It shares no code with lora_hub.
"""

import json
import warnings
from dataclasses import dataclass, field

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model

import lora_hub
from tests.dense import put_in

TOKENS = torch.arange(3, 15).reshape(2, 6)
SIZES = {"vocab_size": 24, "bos_token_id": 1, "eos_token_id": 2}


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(**SIZES, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    return _random(GPT2LMHeadModel, config)


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **SIZES,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,
    )
    return _random(LlamaForCausalLM, config)


def _random(kind, config):
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model


@dataclass(frozen=True)
class Part:
    weight: float
    fields: dict = field(default_factory=dict)
    kind: type = LoraConfig


def lora(weight, *targets, **fields):
    plain = {"r": 3, "lora_alpha": 5, "target_modules": list(targets)}
    return Part(weight, plain | fields)


TURNED = {"fan_in_fan_out": True}
SCALES = {"target_modules": ["c_attn", "c_fc"], "feedforward_modules": [], **TURNED}
CASES = {
    "a new bias under scaled rows": (
        gpt2,
        lora(0.7, "c_attn", "c_fc", use_dora=True, bias="all", **TURNED),
        Part(-0.4, SCALES, IA3Config),
    ),
    "a bias beside the factors under scaled rows": (
        gpt2,
        lora(-1.5, "c_attn", lora_bias=True, bias="lora_only", **TURNED),
        Part(2.5, SCALES, IA3Config),
    ),
    "a whole layer and updates of it": (
        gpt2,
        lora(0.5, "c_proj", modules_to_save=["c_attn", "ln_f"], **TURNED),
        lora(2.0, "c_attn", use_dora=True, **TURNED),
        Part(-1.0, SCALES, IA3Config),
    ),
    "two DoRA adapters": (
        llama,
        lora(1.0, "q_proj", "embed_tokens", use_dora=True),
        lora(-0.7, "q_proj", use_dora=True, use_rslora=True),
    ),
    "rows that overlap, and an update of them": (
        llama,
        lora(1.0, "q_proj", trainable_token_indices=[5, 9]),
        lora(1.0, "v_proj", trainable_token_indices=[9, 11]),
        lora(-0.5, "embed_tokens", use_dora=True, rank_pattern={"embed_tokens": 5}),
    ),
    "two whole embeddings": (
        llama,
        lora(0.6, "q_proj", modules_to_save=["embed_tokens", "norm"]),
        lora(2.5, "q_proj", modules_to_save=["embed_tokens", "lm_head"]),
    ),
}


def saved(build, part, folder, seed):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(build(), part.kind(**part.fields))
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and ("ia3" in name or "magnitude" in name):
                    parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
                elif parameter.requires_grad:
                    parameter.add_(0.2 * torch.randn_like(parameter))
        model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def truth(build, parts, folders):
    base = build().double().state_dict()
    total = {name: tensor.clone() for name, tensor in base.items()}
    for part, folder in zip(parts, folders, strict=True):
        config = json.loads((folder / "adapter_config.json").read_text())
        alone = put_in(build().double(), folder, config).state_dict()
        for name in total:
            total[name] += part.weight * (alone[name] - base[name])
    model = build().double()
    model.load_state_dict(total)
    return output(model)


@torch.no_grad()
def output(model):
    return model(input_ids=TOKENS).logits.double()


@pytest.mark.parametrize("name", CASES)
def test_each_adapter_acts_as_alone_attached_and_merged(name, tmp_path):
    build, *parts = CASES[name]
    folders = [
        saved(build, part, tmp_path / str(index), index + 1)
        for index, part in enumerate(parts)
    ]
    build().save_pretrained(tmp_path / "base")
    exact = truth(build, parts, folders)
    model = build()
    before = output(model)
    host = lora_hub.attach(model)
    for folder in folders:
        host.load(folder, as_=folder.name)

    host.use({f.name: part.weight for f, part in zip(folders, parts, strict=True)})
    attached = output(model)
    host.use(None)
    weighted = [(f, part.weight) for f, part in zip(folders, parts, strict=True)]
    lora_hub.merge(tmp_path / "base", weighted, tmp_path / "out")
    merged = output(type(model).from_pretrained(tmp_path / "out").eval())

    # float32 rounds some hundred times on the way; what is wrong is off by percents.
    assert (attached - exact).norm() <= 1e-5 * exact.norm()
    assert (merged - exact).norm() <= 1e-5 * exact.norm()
    assert torch.equal(output(model), before)
