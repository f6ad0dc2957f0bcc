"""One tiny real adapter for each thing that PEFT's LoRA can say, saved by PEFT itself.

A row is a model, the fields of a `LoraConfig` and what the model is fed. Everything that
was trained is random and nothing of it zero, so that a part that is dropped shows.
"""

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
_VOCABULARY = {"vocab_size": 32, "max_position_embeddings": 64}
_WORDS = {"bos_token_id": 1, "eos_token_id": 2}


def llama(*, tied: bool = False) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    tie = {"tie_word_embeddings": tied}
    return LlamaForCausalLM(LlamaConfig(**_SIZES, **_HEADS, **_VOCABULARY, **_WORDS, **tie))


def tied_llama() -> Any:
    return llama(tied=True)


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, **sizes, **_WORDS))


def mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    experts = {"num_local_experts": 3, "num_experts_per_tok": 2}
    config = MixtralConfig(**_SIZES, **_HEADS, **_VOCABULARY, **_WORDS, **experts)
    return MixtralForCausalLM(config)


def gpt_oss() -> Any:
    """Return a model whose experts are stored (experts, in, out), with biases."""
    from transformers import GptOssConfig, GptOssForCausalLM

    experts = {"num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 4}
    config = GptOssConfig(**_SIZES, **_HEADS, **_VOCABULARY, **_WORDS, **experts)
    return GptOssForCausalLM(config)


def bert() -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(**_SIZES, num_attention_heads=4, **_VOCABULARY, num_labels=3)
    return BertForSequenceClassification(config)


def roberta() -> Any:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    config = RobertaConfig(**_SIZES, num_attention_heads=4, **_VOCABULARY, num_labels=3)
    return RobertaForSequenceClassification(config)


def distilbert() -> Any:
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    sizes = {"dim": 16, "hidden_dim": 24, "n_layers": 1, "n_heads": 4}
    config = DistilBertConfig(vocab_size=32, **sizes, num_labels=3)
    return DistilBertForSequenceClassification(config)


def convolutions() -> Any:
    """Return a net with convolutions of each dimension, one in groups, and a head."""
    from torch import nn

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = nn.Conv1d(4, 6, 3, padding=1)
            self.grouped = nn.Conv2d(6, 8, 3, stride=2, groups=2)
            self.conv2 = nn.Conv2d(8, 4, (1, 3), padding="same")
            self.conv3 = nn.Conv3d(4, 4, (1, 2, 2))
            self.head = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))

        def forward(self, x: Any) -> Any:
            image = self.conv1(x).reshape(len(x), 6, 8, 8)
            volume = self.conv2(self.grouped(image))[:, :, None]
            return self.head(self.conv3(volume).mean((2, 3, 4)))

    return Net()


@dataclass(frozen=True)
class Case:
    """One adapter: the model's builder, PEFT's options."""

    model: Callable[[], Any]
    lora: Mapping[str, Any]
    save: Mapping[str, Any] = field(default_factory=dict)


_Q = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
_BERT = {"target_modules": ["query", "dense"], "task_type": "SEQ_CLS"}
_EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
_NETS = ["conv1", "grouped", "conv2", "conv3"]

CASES: Mapping[str, Case] = {
    "plain": Case(llama, _Q),
    "rslora": Case(llama, {**_Q, "use_rslora": True}),
    "patterns": Case(
        llama,
        {
            **_Q,
            "rank_pattern": {"v_proj": 3, r".*\.1\.self_attn\.q_proj": 1},
            "alpha_pattern": {"q_proj": 5},
        },
    ),
    "layers": Case(llama, {**_Q, "layers_to_transform": 1, "layers_pattern": "layers"}),
    "expression": Case(llama, {**_Q, "target_modules": r".*\.1\..*\.(q|v)_proj"}),
    "all but some": Case(
        llama, {"target_modules": "all-linear", "exclude_modules": ["k_proj"]}
    ),
    "gpt2": Case(gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "dora": Case(llama, {**_Q, "use_dora": True}),
    "dora of embedding": Case(
        llama, {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}
    ),
    "lora_bias": Case(gpt2, {"target_modules": ["c_attn", "c_fc"], "lora_bias": True}),
    "bias of targets": Case(bert, {**_BERT, "bias": "lora_only"}),
    "bias of all": Case(bert, {**_BERT, "bias": "all"}),
    "head": Case(bert, _BERT),
    "head of layers": Case(roberta, {**_BERT, "target_modules": ["query", "value"]}),
    "head and its neighbour": Case(
        distilbert,
        {
            "target_modules": ["q_lin"],
            "task_type": "SEQ_CLS",
            "modules_to_save": ["classifier", "nothing_of_the_kind"],
        },
    ),
    "embedding": Case(llama, {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "embedding alone": Case(
        gpt2, {"target_modules": ["wte", "c_attn"]}, {"save_embedding_layers": False}
    ),
    "embeddings saved": Case(llama, _Q, {"save_embedding_layers": True}),
    "embedding trained": Case(llama, {**_Q, "modules_to_save": ["embed_tokens"]}),
    "rows": Case(llama, {**_Q, "trainable_token_indices": [5, 3]}),
    "rows of two": Case(
        llama, {**_Q, "trainable_token_indices": {"embed_tokens": [7], "lm_head": [1, 4]}}
    ),
    "rows of tied": Case(tied_llama, {**_Q, "trainable_token_indices": [5, 3]}),
    "rows of an output": Case(
        tied_llama, {**_Q, "trainable_token_indices": {"lm_head": [2]}}
    ),
    "rows of tied, unlike": Case(
        tied_llama,
        {**_Q, "trainable_token_indices": {"embed_tokens": [1], "lm_head": [2]}},
    ),
    "tied output": Case(
        tied_llama, {"target_modules": ["lm_head", "q_proj"], "ensure_weight_tying": True}
    ),
    "rows beside a head": Case(
        tied_llama,
        {"target_modules": ["lm_head"], "trainable_token_indices": {"embed_tokens": [9]}},
        {"save_embedding_layers": False},
    ),
    "tied update": Case(
        tied_llama,
        {
            "target_modules": ["embed_tokens", "q_proj"],
            "ensure_weight_tying": True,
            "rank_pattern": {"q_proj": 3},
        },
    ),
    "tied module": Case(
        tied_llama, {**_Q, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    ),
    "convolutions": Case(
        convolutions, {"target_modules": _NETS, "modules_to_save": ["head"]}
    ),
    "convolutions with biases": Case(
        convolutions, {"target_modules": _NETS, "lora_bias": True, "bias": "all"}
    ),
    "biases of a head": Case(
        convolutions,
        {"target_modules": ["conv1"], "modules_to_save": ["head"], "bias": "all"},
    ),
    "dora of convolutions": Case(
        convolutions, {"target_modules": ["conv1", "conv2", "conv3"], "use_dora": True}
    ),
    "experts": Case(
        mixtral,
        {
            **_Q,
            "target_parameters": _EXPERTS,
            "rank_pattern": {"experts.down_proj": 3},
            "alpha_pattern": {"gate_up_proj": 5},
        },
    ),
    "experts stored transposed": Case(
        gpt_oss,
        {
            "target_modules": [],
            "target_parameters": ["down_proj_bias", "down_proj", "gate_up_proj"],
        },
    ),
    "experts alone": Case(
        mixtral, {"target_modules": [], "target_parameters": ["experts.down_proj"]}
    ),
    "a matrix as parameter": Case(
        mixtral, {"target_modules": [], "target_parameters": ["mlp.gate.weight"]}
    ),
    "experts and all else": Case(mixtral, {"target_modules": "all-linear"}),
    "alora": Case(llama, {**_Q, "alora_invocation_tokens": [7, 8]}),
}


def model(case: Case) -> Any:
    """Return the case's model, the same each time."""
    import torch

    torch.manual_seed(0)
    return case.model().eval()


def save(case: Case, folder: Path, base: Any = None) -> Any:
    """Train nothing, but make everything trained random; save it and return the model."""
    import torch
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice about what is meant here
        adapted = get_peft_model(
            base or model(case), LoraConfig(r=2, lora_alpha=6, **copy.deepcopy(case.lora))
        ).eval()
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.uniform_(-0.5, 0.5)
        adapted.save_pretrained(folder, **{"save_embedding_layers": "auto", **case.save})
    (folder / "README.md").unlink(missing_ok=True)
    return adapted


def loaded(case: Case, folder: Path) -> Any:
    """Return the case's model with the adapter in the folder, as PEFT loads it."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(model(case), folder).eval()


def answer(adapted: Any) -> Any:
    """Return what a model gives for a fixed small input."""
    import torch

    with torch.no_grad():
        if not hasattr(adapted.get_base_model(), "config"):
            return adapted(torch.linspace(-1, 1, 2 * 4 * 64).reshape(2, 4, 64))
        tokens = torch.arange(24).reshape(2, 12) % 32
        return adapted(input_ids=tokens).logits
