"""Every semantics of PEFT's LoRA, and IA3: attached by us, against PEFT and the truth.

For each case PEFT makes and saves an adapter, a host attaches the folder to a fresh model,
and the outputs are compared. The truth is `tests/dense.py` in float64; our error is at most
twice that of the same formula in plain torch in the model's dtype.
"""

import json
from dataclasses import dataclass, field

import pytest
import torch
from peft import (
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftModel,
    TaskType,
    VeraConfig,
    get_peft_model,
)
from torch import nn

import lora_hub
from lora_hub.public.models import save
from tests.builders import VOCABULARY, tiny_model
from tests.dense import put_in

TOKENS = torch.arange(24).reshape(2, 12) % VOCABULARY


def llama(*, tied=False):
    model = tiny_model()
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    return model


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=32, n_embd=16, n_layer=2, n_head=2
    )
    return _with_biases(GPT2LMHeadModel(config).eval())


def gemma():
    """Return a model whose embedding scales what it looks up."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    return Gemma3ForCausalLM(config).eval()


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        num_labels=3,
        initializer_range=0.3,
    )
    return _with_biases(BertForSequenceClassification(config).eval())


def mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        experts_implementation="eager",  # torch has no grouped products in float64
    )
    return MixtralForCausalLM(config).eval()


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.line = nn.Conv1d(4, 8, 3, stride=2, padding=1)
        self.plane = nn.Conv2d(1, 6, (3, 5), padding="same", bias=False)
        self.point = nn.Conv2d(6, 8, 1)
        self.grouped = nn.Conv2d(8, 12, 3, padding=1, groups=2)
        self.space = nn.Conv3d(1, 4, 3, padding=1)

    def forward(self, x):
        x = self.line(x).tanh().unsqueeze(1)
        x = self.grouped(self.point(self.plane(x).tanh()).tanh()).tanh()
        return self.space(x.unsqueeze(1))


def convolutions():
    return Convolutions().eval()


def _with_biases(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model


@torch.no_grad()
def output(model):
    if isinstance(model, Convolutions) or hasattr(model, "line"):
        torch.manual_seed(7)
        x = torch.randn(2, 4, 16).to(next(model.parameters()).dtype)
        return model(x).double()
    found = model(input_ids=TOKENS % model.config.vocab_size)
    return found.logits.double()


@dataclass(frozen=True)
class Case:
    base: object
    fields: dict = field(default_factory=dict)
    kind: type = LoraConfig
    saved: dict = field(default_factory=lambda: {"save_embedding_layers": False})
    untie: bool = False  # whether the truth has a tensor for each of two tied layers


ATTENTION = {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 6}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CONV = {"target_modules": ["line", "plane", "point", "space"], "r": 4, "lora_alpha": 6}
CASES = {
    "plain": Case(llama, ATTENTION),
    "rslora": Case(llama, {**ATTENTION, "use_rslora": True}),
    "patterns": Case(
        llama,
        {
            **ATTENTION,
            "target_modules": ["q_proj", "v_proj", "up_proj"],
            "rank_pattern": {"up_proj": 3, r"layers\.1\.self_attn\.q_proj": 5},
            "alpha_pattern": {"v_proj": 9},
            "use_rslora": True,
        },
    ),
    "dora": Case(llama, {**ATTENTION, "use_dora": True}),
    "dora rslora": Case(llama, {**ATTENTION, "use_dora": True, "use_rslora": True}),
    "lora_bias": Case(
        bert,
        {
            "target_modules": ["query", "value"],
            "r": 4,
            "lora_alpha": 6,
            "lora_bias": True,
        },
    ),
    "lora_bias without a bias": Case(llama, {**ATTENTION, "lora_bias": True}),
    "dora on biased layers": Case(
        bert, {"target_modules": ["query"], "r": 3, "lora_alpha": 5, "use_dora": True}
    ),
    "fan_in_fan_out": Case(
        gpt2,
        {
            "target_modules": ["c_attn", "c_fc", "c_proj"],
            "r": 4,
            "lora_alpha": 6,
            "fan_in_fan_out": True,
        },
    ),
    "fan_in_fan_out dora": Case(
        gpt2,
        {
            "target_modules": ["c_attn", "c_proj"],
            "r": 4,
            "lora_alpha": 6,
            "fan_in_fan_out": True,
            "use_dora": True,
        },
    ),
    "classifier": Case(
        bert,
        {
            "target_modules": ["query", "dense"],
            "r": 4,
            "lora_alpha": 6,
            "task_type": TaskType.SEQ_CLS,
            "bias": "all",
        },
    ),
    "bias lora_only": Case(
        gpt2,
        {
            "target_modules": ["c_attn"],
            "r": 2,
            "lora_alpha": 6,
            "fan_in_fan_out": True,
            "bias": "lora_only",
        },
    ),
    "modules_to_save": Case(llama, {**ATTENTION, "modules_to_save": ["lm_head", "norm"]}),
    "trainable tokens": Case(llama, {**ATTENTION, "trainable_token_indices": [3, 17, 5]}),
    "trainable tokens, tied": Case(
        lambda: llama(tied=True), {**ATTENTION, "trainable_token_indices": [3, 17]}
    ),
    "embedding": Case(
        llama, {**ATTENTION, "target_modules": ["embed_tokens", "q_proj", "lm_head"]}
    ),
    "embedding dora": Case(
        llama, {**ATTENTION, "target_modules": ["embed_tokens", "q_proj"], "use_dora": True}
    ),
    "embedding saved along": Case(
        llama,
        {**ATTENTION, "target_modules": ["embed_tokens", "q_proj"]},
        saved={"save_embedding_layers": True},
    ),
    "experts": Case(
        mixtral,
        {**ATTENTION, "target_parameters": EXPERTS, "rank_pattern": {"q_proj": 2}},
    ),
    "one parameter of the experts": Case(
        mixtral,
        {
            "target_modules": [],
            "target_parameters": EXPERTS[1:],
            "r": 3,
            "lora_alpha": 7,
            "use_rslora": True,
        },
    ),
    "router": Case(
        mixtral,
        {
            "target_modules": [],
            "target_parameters": ["mlp.gate.weight"],
            "r": 3,
            "lora_alpha": 7,
        },
    ),
    "convolutions": Case(convolutions, CONV, saved={}),
    "convolutions rslora bias": Case(
        convolutions, {**CONV, "use_rslora": True, "lora_bias": True}, saved={}
    ),
    "convolutions dora": Case(convolutions, {**CONV, "use_dora": True}, saved={}),
    "grouped convolution": Case(
        convolutions, {**CONV, "target_modules": ["grouped"]}, saved={}
    ),
    "embedding, tied": Case(
        lambda: llama(tied=True),
        {
            **ATTENTION,
            "target_modules": ["embed_tokens", "q_proj"],
            "ensure_weight_tying": True,
        },
        untie=True,
    ),
    "embedding, tied but not meant": Case(
        lambda: llama(tied=True),
        {**ATTENTION, "target_modules": ["embed_tokens"]},
        untie=True,
    ),
    "modules_to_save, tied": Case(
        lambda: llama(tied=True),
        {**ATTENTION, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "modules_to_save, tied but not meant": Case(
        lambda: llama(tied=True),
        {**ATTENTION, "modules_to_save": ["lm_head"]},
        untie=True,
    ),
    "scaled embedding": Case(
        gemma, {**ATTENTION, "target_modules": ["embed_tokens", "q_proj"]}
    ),
    "scaled embedding dora": Case(
        gemma, {**ATTENTION, "target_modules": ["embed_tokens"], "use_dora": True}
    ),
    "vera": Case(
        llama,
        {"target_modules": ["down_proj"], "r": 6, "save_projection": True},
        VeraConfig,
    ),
    "loha": Case(
        llama, {"target_modules": ["q_proj", "v_proj"], "r": 2, "alpha": 5}, LoHaConfig
    ),
    "lokr": Case(
        llama, {"target_modules": ["q_proj", "v_proj"], "r": 2, "alpha": 5}, LoKrConfig
    ),
    "ia3": Case(
        llama,
        {
            "target_modules": ["k_proj", "v_proj", "down_proj"],
            "feedforward_modules": ["down_proj"],
        },
        IA3Config,
    ),
    "ia3 on biased layers": Case(
        bert,
        {"target_modules": ["key", "output.dense"], "feedforward_modules": []},
        IA3Config,
    ),
    "ia3 fan_in_fan_out": Case(
        gpt2,
        {
            "target_modules": ["c_attn", "mlp.c_proj"],
            "feedforward_modules": ["mlp.c_proj"],
            "fan_in_fan_out": True,
        },
        IA3Config,
    ),
}


# What PEFT warns of where it works all the same.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{text}")
    for text in (
        "Adapter 'default'.* LoRA tensor.* have invalid shape",
        "`lora_bias=True` was passed but the targeted layer",
        "LoRA adapter added to ConvNd layer with groups",
        "Model has `tie_word_embeddings=True` and a tied layer",
        "fan_in_fan_out is set to False but the target module is `Conv1D`",
        "Found missing adapter keys while loading the checkpoint",
    )
]


def made(case, folder, dtype=torch.float32):
    """Save the case's adapter with PEFT and return PEFT's own model."""
    torch.manual_seed(1)
    theirs = get_peft_model(case.base().to(dtype), case.kind(**case.fields))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if not parameter.requires_grad:
                continue
            if "magnitude" in name or "ia3" in name:
                parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
    theirs.save_pretrained(folder, **case.saved)
    return theirs.eval()


def dense_base(case):
    model = case.base()
    if case.untie:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return model


@pytest.mark.parametrize("name", CASES)
def test_attached_is_what_peft_does_and_as_exact_as_plain_torch(name, tmp_path):
    case = CASES[name]
    theirs = output(made(case, tmp_path))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    model = case.base()
    base = output(model)

    host = lora_hub.attach(model)
    report = host.load(tmp_path, as_="mine")
    host.use("mine")
    ours = output(model)
    host.detach()

    truth = output(put_in(dense_base(case).double(), tmp_path, config))
    plain = output(put_in(dense_base(case), tmp_path, config))
    # At worst one rounding of the largest output where plain torch happens to be exact.
    floor = torch.finfo(torch.float32).eps * truth.norm()
    assert report.targets > 0
    assert (theirs - truth).norm() <= 10 * (plain - truth).norm() + floor
    assert (ours - truth).norm() <= 2 * (plain - truth).norm() + floor
    assert (ours - base).abs().max() > 1e-2 * base.abs().max()
    assert torch.equal(output(model), base)


SAVED = [name for name, case in CASES.items() if case.kind is LoraConfig]


@pytest.mark.parametrize("name", SAVED)
def test_what_we_save_peft_loads_with_the_same_effect(name, tmp_path):
    case = CASES[name]
    theirs = output(made(case, tmp_path / "theirs"))
    adapter = lora_hub.load_adapter(tmp_path / "theirs")

    save(adapter, tmp_path / "ours")

    again = PeftModel.from_pretrained(case.base(), tmp_path / "ours").eval()
    assert torch.equal(output(again), theirs)


@pytest.mark.parametrize(
    "name",
    ["dora", "classifier", "experts", "trainable tokens", "convolutions dora", "ia3"],
)
def test_with_a_weight_the_whole_change_counts_that_much(name, tmp_path):
    case = CASES[name]
    made(case, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    model = case.base()
    host = lora_hub.attach(model)
    host.load(tmp_path, as_="mine")

    host.use({"mine": 0.6})

    truth = output(put_in(case.base().double(), tmp_path, config, 0.6))
    plain = output(put_in(case.base(), tmp_path, config, 0.6))
    floor = torch.finfo(torch.float32).eps * truth.norm()
    assert (output(model) - truth).norm() <= 2 * (plain - truth).norm() + floor


@pytest.mark.parametrize(
    "name", ["dora", "classifier", "embedding dora", "trainable tokens", "convolutions"]
)
def test_in_bfloat16_we_are_as_exact_as_plain_torch(name, tmp_path):
    case = CASES[name]
    made(case, tmp_path, torch.bfloat16)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    model = case.base().bfloat16()
    host = lora_hub.attach(model)
    host.load(tmp_path, as_="mine")

    host.use("mine")

    wide = case.base().bfloat16().double()
    truth = output(put_in(wide, tmp_path, config))
    plain = output(put_in(case.base().bfloat16(), tmp_path, config))
    assert (output(model) - truth).norm() <= 2 * (plain - truth).norm()


ALORA = {**ATTENTION, "alora_invocation_tokens": [5, 6]}


def alora(folder):
    return made(Case(llama, {**ALORA, "task_type": TaskType.CAUSAL_LM}), folder)


def test_an_alora_acts_from_its_last_invocation_on_as_in_peft(tmp_path):
    theirs = alora(tmp_path)
    model = llama()
    host = lora_hub.attach(model)
    host.load(tmp_path, as_="mine")
    tokens = torch.tensor(
        [
            [1, 5, 6, 7, 5, 6, 8, 9],
            [5, 6, 2, 3, 4, 9, 8, 7],
            [6, 5, 6, 1, 5, 2, 2, 2],
            [1, 2, 3, 4, 3, 2, 1, 9],
        ]
    )
    base = model(tokens).logits

    host.use("mine")

    ours = model(tokens).logits
    wanted = theirs(input_ids=tokens).logits
    assert (ours - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert torch.equal(ours[0, :4], base[0, :4])  # before it, the base's own bits
    assert not torch.equal(ours[0, 4:], base[0, 4:])
    assert torch.equal(ours[3], base[3])


def test_an_alora_goes_on_from_a_cache_it_saw_as_in_peft(tmp_path):
    theirs = alora(tmp_path)
    model = llama()
    host = lora_hub.attach(model)
    host.load(tmp_path, as_="mine")
    host.use("mine")
    tokens = torch.tensor([[1, 5, 6, 7], [1, 2, 3, 4]])
    plain = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0}
    plain |= {"output_logits": True, "return_dict_in_generate": True}
    mask = torch.ones_like(tokens)

    ours = model.generate(tokens, attention_mask=mask, **plain)

    wanted = theirs.generate(input_ids=tokens, attention_mask=mask, **plain)
    assert torch.equal(ours.sequences, wanted.sequences)
    for one, other in zip(ours.logits, wanted.logits, strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()
