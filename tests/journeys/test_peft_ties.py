"""What PEFT ties, what it leaves alone, and that an attached and a merged model follow it.

PEFT's own model, with the adapter it saved, is the truth of each case. Biases are not zero
and all of the adapter is random, so that a use that is wrongly changed shows.
"""

import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import lora_hub
from lora_hub.errors import FitError

TOKENS = torch.arange(3, 15).reshape(2, 6)
SIZES = {"vocab_size": 24, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **SIZES,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config)


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(**SIZES, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    return GPT2LMHeadModel(config)


def bloom():
    from transformers import BloomConfig, BloomForCausalLM

    config = BloomConfig(
        **SIZES, hidden_size=16, n_layer=1, n_head=2, initializer_range=0.3
    )
    return BloomForCausalLM(config)


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=24,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config)


def bert():
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=24,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        initializer_range=0.3,
    )
    return BertForMaskedLM(config)


def whisper():
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    sides = {
        f"{side}_{what}": count
        for side in ("encoder", "decoder")
        for what, count in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 24))
    }
    config = WhisperConfig(
        **SIZES,
        **sides,
        num_mel_bins=4,
        d_model=16,
        max_source_positions=6,
        max_target_positions=32,
        decoder_start_token_id=2,
        init_std=0.3,
    )
    return WhisperForConditionalGeneration(config)


def built(build):
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model


@torch.no_grad()
def output(model):
    kind = model.config.model_type
    if kind == "whisper":
        sound = torch.linspace(-1, 1, 96).reshape(2, 4, 12)
        return model(input_features=sound, decoder_input_ids=TOKENS).logits
    if kind == "t5":
        return model(input_ids=TOKENS, decoder_input_ids=TOKENS[:, :4]).logits
    return model(input_ids=TOKENS).logits


def saved(build, fields, folder):
    """Return what PEFT gives with the adapter that it saved in the folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(**{"r": 3, "lora_alpha": 5} | fields)
        model = get_peft_model(built(build), config)
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn_like(parameter))
        model.save_pretrained(folder, save_embedding_layers=False)
        return output(PeftModel.from_pretrained(built(build), folder).eval())


def attached(build, folder):
    model = built(build)
    host = lora_hub.attach(model)
    report = host.load(folder, as_="mine")
    host.use("mine")
    return output(model), report


def is_near(one, other):
    return bool((one - other).norm() <= 1e-5 * other.norm())


ASKED = {"ensure_weight_tying": True}
# Asked to tie, but PEFT knows only the names embed_tokens and lm_head.
NOT_TIED = {
    "an update of GPT-2's": (gpt2, {"target_modules": ["wte", "c_fc"], **ASKED}),
    "GPT-2's, trained whole": (
        gpt2,
        {"target_modules": ["c_fc"], "modules_to_save": ["wte"], **ASKED},
    ),
    "an update of Bloom's": (
        bloom,
        {"target_modules": ["word_embeddings", "query_key_value"], **ASKED},
    ),
    "an update of T5's": (t5, {"target_modules": ["shared", "q"], **ASKED}),
    "an expression with a path": (
        llama,
        {"target_modules": r".*\.(embed_tokens|q_proj)", **ASKED},
    ),
}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("name", NOT_TIED)
def test_what_peft_was_asked_to_tie_and_does_not_is_not_tied(name, tmp_path):
    build, fields = NOT_TIED[name]
    theirs = saved(build, fields, tmp_path / "adapter")
    built(build).save_pretrained(tmp_path / "base")

    ours, _ = attached(build, tmp_path / "adapter")

    assert is_near(ours, theirs)
    with pytest.raises(FitError, match="the adapter changes one"):
        lora_hub.merge(tmp_path / "base", [(tmp_path / "adapter", 1.0)], tmp_path / "out")


TIED = {
    "a list": (llama, {"target_modules": ["embed_tokens", "q_proj"], **ASKED}),
    "an expression": (
        llama,
        {"target_modules": r"(.*\.)?(embed_tokens|q_proj)", **ASKED},
    ),
    "the head": (llama, {"target_modules": ["lm_head", "q_proj"], **ASKED}),
    "a head of another name": (
        whisper,
        {"target_modules": ["embed_tokens", "q_proj"], **ASKED},
    ),
}


@pytest.mark.parametrize("name", TIED)
def test_what_peft_ties_is_tied_attached_and_merged(name, tmp_path):
    build, fields = TIED[name]
    theirs = saved(build, fields, tmp_path / "adapter")
    built(build).save_pretrained(tmp_path / "base")

    ours, _ = attached(build, tmp_path / "adapter")
    lora_hub.merge(tmp_path / "base", [(tmp_path / "adapter", 1.0)], tmp_path / "out")

    merged = type(built(build)).from_pretrained(tmp_path / "out").eval()
    assert is_near(ours, theirs)
    assert is_near(output(merged), theirs)


def test_rows_of_a_head_are_never_the_embeddings(tmp_path):
    fields = {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [4, 9]}}
    theirs = saved(llama, fields | ASKED, tmp_path / "adapter")
    built(llama).save_pretrained(tmp_path / "base")

    ours, _ = attached(llama, tmp_path / "adapter")

    assert is_near(ours, theirs)
    with pytest.raises(FitError, match="the adapter changes one"):
        lora_hub.merge(tmp_path / "base", [(tmp_path / "adapter", 1.0)], tmp_path / "out")


def test_rows_of_an_embedding_that_is_not_the_models_input_are_its_own(tmp_path):
    rows = {"decoder.embed_tokens": [4, 9]}
    fields = {"target_modules": ["q"], "trainable_token_indices": rows}
    theirs = saved(t5, fields, tmp_path)

    ours, _ = attached(t5, tmp_path)

    assert is_near(ours, theirs)


def test_a_tied_head_keeps_its_bias_which_peft_forgets_and_the_report_says_so(tmp_path):
    fields = {"target_modules": ["query"], "trainable_token_indices": [4, 9]}
    theirs = saved(bert, {**fields, "bias": "all"}, tmp_path)

    ours, report = attached(bert, tmp_path)

    forgotten = built(bert).cls.predictions.decoder.bias
    with torch.no_grad():
        changed = lora_hub.load_adapter(tmp_path).replaced["cls.predictions.bias"].tensor
    assert forgotten.shape == changed.shape
    assert is_near(ours - changed, theirs)
    assert "keeps its bias; PEFT attached leaves it out" in str(report)
