"""Merged checkpoints against PEFT's `merge_and_unload` and a float64 oracle.

The oracle is dense algebra in float64 over the files that PEFT wrote. PEFT's own merge is
the same formula in plain torch in the dtype of the base, so our error may be at most twice
its. The logits are those of the model with the adapter attached.
"""

import json
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import lora_hub
from tests.builders import tiny_model

TOKENS = torch.arange(24).reshape(2, 12)
PREFIX = "base_model.model."


def llama():
    return tiny_model()


def tied_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=32,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=32,
        bos_token_id=1,
        eos_token_id=2,
    )
    return _with_biases(GPT2LMHeadModel(config))


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        num_labels=3,
        initializer_range=0.3,
    )
    return _with_biases(BertForSequenceClassification(config))


def mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=3,
        bos_token_id=1,
        eos_token_id=2,
    )
    return MixtralForCausalLM(config)


class Convolutions(nn.Module):
    """One to three axes of kernel, one after the other."""

    def __init__(self):
        super().__init__()
        self.one = nn.Conv1d(3, 6, 3, padding=1)
        self.two = nn.Conv2d(2, 4, (3, 2), stride=2)
        self.three = nn.Conv3d(1, 3, (2, 1, 2))
        self.grouped = nn.Conv1d(6, 4, 3, groups=2)
        self.last = nn.Linear(4, 5)

    def forward(self, x):
        x = self.one(x)  # (batch, 3, 12) → (batch, 6, 12)
        skip = self.grouped(x).mean(dim=2)
        x = self.two(x.reshape(len(x), 2, 6, 6)).reshape(len(x), 1, 4, 3, 2)
        return self.last(self.three(x).mean(dim=(2, 3, 4)) @ torch.ones(3, 4).to(x) + skip)


def convolutions():
    torch.manual_seed(0)
    return Convolutions()


def _with_biases(model):
    """Return the model with biases that are not zero, as trained ones are not."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model


@dataclass(frozen=True)
class Case:
    """A model, what PEFT is told, and how the model stores what the adapter names."""

    model: Callable[[], nn.Module]
    config: Callable[[], Any]
    scaling: Callable[[str], float] = lambda _target: 5 / 3
    transposed: tuple[str, ...] = ()
    experts: Mapping[str, str] = field(default_factory=dict)
    run: Callable[[nn.Module], torch.Tensor] = lambda model: model(TOKENS).logits
    is_tied: bool = False
    peft_merges: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)
    save_embeddings: Any = False


def lora(*targets, **fields):
    return lambda: LoraConfig(
        **{"r": 3, "lora_alpha": 5, "target_modules": list(targets)} | fields
    )


def run_convolutions(model):
    dtype = model.one.weight.dtype
    return model(torch.linspace(-1, 1, 72).reshape(2, 3, 12).to(dtype))


EXPERTS = {"mlp.experts.base_layer": "gate_up_proj", "mlp.experts": "down_proj"}
CASES = {
    "plain": Case(llama, lora("q_proj", "v_proj", "down_proj")),
    "rslora": Case(
        llama, lora("q_proj", "up_proj", use_rslora=True), scaling=lambda _: 5 / 3**0.5
    ),
    "patterns": Case(
        llama,
        lora(
            "q_proj",
            "down_proj",
            rank_pattern={"down_proj": 4},
            alpha_pattern={"down_proj": 7, "layers.1.self_attn.q_proj": 2},
        ),
        scaling=lambda target: (
            7 / 4 if "down_proj" in target else 2 / 3 if "layers.1" in target else 5 / 3
        ),
    ),
    "dora": Case(llama, lora("q_proj", "v_proj", "down_proj", use_dora=True)),
    "lora_bias": Case(bert, lora("query", "dense", lora_bias=True)),
    "bias all": Case(bert, lora("query", bias="all")),
    "bias lora_only": Case(bert, lora("query", "value", bias="lora_only")),
    "modules_to_save": Case(
        bert, lora("query", "classifier", task_type="SEQ_CLS", modules_to_save=["pooler"])
    ),
    "token rows": Case(llama, lora("q_proj", trainable_token_indices=[7, 2, 30])),
    "embeddings": Case(llama, lora("embed_tokens", "lm_head")),
    "embeddings, saved too": Case(llama, lora("embed_tokens"), save_embeddings=True),
    "embeddings, dora": Case(llama, lora("embed_tokens", "q_proj", use_dora=True)),
    "gpt2": Case(
        gpt2,
        lora("c_attn", "c_proj", "c_fc", fan_in_fan_out=True),
        transposed=("c_attn", "c_proj", "c_fc"),
    ),
    "gpt2, dora, bias": Case(
        gpt2,
        lora("c_attn", "c_proj", use_dora=True, fan_in_fan_out=True, bias="all"),
        transposed=("c_attn", "c_proj"),
    ),
    "convolutions": Case(convolutions, lora("one", "two", "last"), run=run_convolutions),
    "convolutions, three axes": Case(
        convolutions,
        lora("three", use_rslora=True),
        lambda _: 5 / 3**0.5,
        run=run_convolutions,
    ),
    "convolutions, dora": Case(
        convolutions, lora("one", "two", use_dora=True), run=run_convolutions
    ),
    "experts": Case(
        mixtral,
        lora(
            "q_proj",
            target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        ),
        experts=EXPERTS,
    ),
    "one parameter of experts": Case(
        mixtral,
        lora("v_proj", target_parameters=["mlp.experts.down_proj"], use_rslora=True),
        scaling=lambda _: 5 / 3**0.5,
        experts={"mlp.experts": "down_proj"},
    ),
    "ia3": Case(
        llama,
        lambda: IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"],
            feedforward_modules=["down_proj"],
        ),
    ),
    "ia3 with biases": Case(
        bert,
        lambda: IA3Config(
            target_modules=["key", "output.dense"], feedforward_modules=["output.dense"]
        ),
    ),
    "ia3 on gpt2": Case(
        gpt2,
        lambda: IA3Config(
            target_modules=["c_attn", "mlp.c_proj"],
            feedforward_modules=["mlp.c_proj"],
            fan_in_fan_out=True,
        ),
        transposed=("c_attn", "c_proj"),
    ),
    # PEFT merges a tied pair twice into its one tensor.
    "tied": Case(
        tied_llama,
        lora("embed_tokens", "q_proj", ensure_weight_tying=True),
        is_tied=True,
        peft_merges=False,
    ),
    # PEFT changes both uses, though the adapter is for one.
    "untied embedding": Case(
        tied_llama,
        lora("embed_tokens", "q_proj"),
        peft_merges=False,
        options={"untie": True},
    ),
    "untied head": Case(
        tied_llama,
        lora("lm_head", "q_proj", use_dora=True),
        peft_merges=False,
        options={"untie": True},
    ),
    "tied, whole": Case(
        tied_llama,
        lora("q_proj", modules_to_save=["embed_tokens"], ensure_weight_tying=True),
        is_tied=True,
    ),
    "tied, token rows": Case(
        tied_llama, lora("q_proj", trainable_token_indices=[7, 2]), is_tied=True
    ),
}


def base_folder(case, folder, dtype):
    model = case.model().to(dtype)
    if isinstance(model, Convolutions):
        folder.mkdir()
        save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps({"model_type": "convolutions"}))
    else:
        model.save_pretrained(folder, max_shard_size="6KB")
    return folder


def open_base(case, folder, dtype):
    if case.model is convolutions:
        model = Convolutions().to(dtype)
        model.load_state_dict(load_file(folder / "model.safetensors"))
        return model.eval()
    return type(case.model()).from_pretrained(folder, dtype=dtype).eval()


def adapter_folder(case, folder, base, seed=1):
    """Save what PEFT makes of a base, every trained number changed."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base, case.config())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name and "magnitude" not in name:
                    parameter.normal_(std=0.3)
                elif parameter.requires_grad or "magnitude" in name:
                    parameter.mul_(1 + 0.3 * torch.randn_like(parameter)).add_(0.01)
        model.save_pretrained(folder, save_embedding_layers=case.save_embeddings)
    return folder


def oracle(case, base, held, weight=1.0):
    """Return tensor name → float64 numbers of everything the adapter changes."""
    held = {name.removeprefix(PREFIX): tensor.double() for name, tensor in held.items()}
    base = {name: tensor.double() for name, tensor in base.items()}
    new = {}

    def change(name, value):
        new[name] = new.get(name, base[name]) + value

    for name, tensor in held.items():  # what replaces comes first
        if "token_adapter" in name:
            target = name.split(".token_adapter")[0] + ".weight"
            rows = case.config().trainable_token_indices
            new[target] = base[target].clone()
            new[target][rows] = tensor
        elif not re.search(r"lora_|ia3_l", name):
            new[name.replace(".base_layer", "")] = tensor
    own = base | new
    for name, tensor in held.items():
        if name.endswith("ia3_l"):
            target = name.removesuffix(".ia3_l")
            matrix = own[f"{target}.weight"]
            is_columns = any(
                target.endswith(end) for end in case.config().feedforward_modules
            )
            turned = target.endswith(case.transposed) if case.transposed else False
            factors = tensor.reshape(-1)
            along_columns = is_columns != turned
            scaled = matrix * (factors if along_columns else factors[:, None])
            change(f"{target}.weight", scaled - matrix)
            if not is_columns and f"{target}.bias" in own:
                change(f"{target}.bias", (factors - 1) * own[f"{target}.bias"])
            continue
        found = re.fullmatch(r"(.*)\.lora_(embedding_)?A(\.weight)?", name)
        if not found:
            continue
        target, scaling = found[1], case.scaling(found[1])
        a, b = tensor, held[name.replace("_A", "_B")]
        experts = next((end for end in case.experts if target.endswith(end)), None)
        if experts:
            path = f"{target.removesuffix('.base_layer')}.{case.experts[experts]}"
            count = own[path].shape[0]
            rank = a.shape[0] // count
            for expert in range(count):
                rows = slice(expert * rank, (expert + 1) * rank)
                own_b = b.reshape(len(b), rank, count)[:, :, expert]
                new.setdefault(path, own[path].clone())[expert] += scaling * own_b @ a[rows]
            continue
        weight = own[f"{target}.weight"]
        turned = bool(found[2]) or (case.transposed and target.endswith(case.transposed))
        matrix = weight.T if turned else weight.flatten(1)
        total = matrix + scaling * (b.flatten(1) @ a.flatten(1))
        magnitude = held.get(f"{target}.lora_magnitude_vector")
        if magnitude is not None:
            total = total * (magnitude.reshape(-1, 1) / total.norm(dim=1, keepdim=True))
        if not (case.is_tied and target == "lm_head"):  # that is the embedding again
            difference = total - matrix
            change(
                f"{target}.weight",
                (difference.T if turned else difference.reshape(weight.shape)),
            )
        bias = held.get(f"{target}.lora_B.bias")
        if bias is not None:
            change(f"{target}.bias", scaling * bias)
    if case.is_tied and "model.embed_tokens.weight" in new:
        new["lm_head.weight"] = new["model.embed_tokens.weight"]
    return new


@pytest.fixture(scope="module", params=sorted(CASES))
def made(request, tmp_path_factory):
    """Return a case, its base in float32 and its adapter."""
    case = CASES[request.param]
    folder = tmp_path_factory.mktemp("case")
    base = base_folder(case, folder / "base", torch.float32)
    adapter = adapter_folder(case, folder / "adapter", open_base(case, base, torch.float32))
    return case, base, adapter


def peft_merged(case, base, adapter, dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(open_base(case, base, dtype), adapter)
        return model.merge_and_unload().state_dict()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_errors_are_at_most_twice_those_of_plain_torch(made, tmp_path, dtype):
    case, base, adapter = made
    dtype = getattr(torch, dtype)
    base = base_folder(case, tmp_path / "base", dtype)
    before = open_base(case, base, dtype).state_dict()
    exact = oracle(case, before, load_file(adapter / "adapter_model.safetensors"))

    lora_hub.merge(base, [(adapter, 1.0)], tmp_path / "out", **case.options)

    after = open_base(case, tmp_path / "out", dtype).state_dict()
    theirs = peft_merged(case, base, adapter, dtype) if case.peft_merges else None
    assert exact
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        if name not in exact:
            assert torch.equal(tensor, before[name]), name
            continue
        wanted = theirs[name] if theirs else exact[name].to(dtype)
        allowed = 2 * (wanted.double() - exact[name]).norm()
        assert (tensor.double() - exact[name]).norm() <= allowed, name
        assert not torch.equal(tensor, before[name]), name


def test_the_merged_model_gives_the_logits_of_the_attached_one(made, tmp_path):
    case, base, adapter = made
    lora_hub.merge(base, [(adapter, 1.0)], tmp_path / "out", **case.options)
    model = open_base(case, base, torch.float32)
    with torch.no_grad():
        plain = case.run(model)
    host = lora_hub.attach(model)
    host.load(adapter, as_="own")
    host.use({"own": 1.0})

    with torch.no_grad():
        attached = case.run(model)
        merged = case.run(open_base(case, tmp_path / "out", torch.float32))

    assert (merged - attached).abs().max() <= 5e-6 * attached.abs().max()
    assert (plain - attached).abs().max() > 1e-3 * attached.abs().max()


PAIRS = [
    ("dora", "dora"),
    ("dora", "plain"),
    ("ia3", "dora"),
    ("token rows", "embeddings, dora"),
    ("lora_bias", "ia3 with biases"),
    ("modules_to_save", "bias all"),
    ("gpt2, dora, bias", "gpt2"),
    ("gpt2", "ia3 on gpt2"),
    ("convolutions", "convolutions, dora"),
    ("experts", "one parameter of experts"),
    ("tied", "tied, token rows"),
]


@pytest.mark.parametrize("names", PAIRS, ids=" + ".join)
def test_several_adapters_are_one_sum_against_the_unmerged_base(names, tmp_path):
    weights = (0.7, -0.4)
    cases = [CASES[name] for name in names]
    base = base_folder(cases[0], tmp_path / "base", torch.float32)
    adapters = [
        adapter_folder(
            case, tmp_path / f"adapter{seed}", open_base(case, base, torch.float32), seed
        )
        for seed, case in enumerate(cases)
    ]
    before = open_base(cases[0], base, torch.float32).state_dict()
    exact = {}
    for case, adapter, weight in zip(cases, adapters, weights, strict=True):
        alone = oracle(case, before, load_file(adapter / "adapter_model.safetensors"))
        for name, tensor in alone.items():
            own = before[name].double()
            exact[name] = exact.get(name, own) + weight * (tensor - own)

    lora_hub.merge(base, list(zip(adapters, weights, strict=True)), tmp_path / "out")

    after = open_base(cases[0], tmp_path / "out", torch.float32).state_dict()
    for name, tensor in after.items():
        wanted = exact.get(name, before[name].double())
        rounded = (before[name] + (wanted - before[name]).float()).double()
        assert (tensor - wanted).norm() <= 2 * (rounded - wanted).norm(), name
    model = open_base(cases[0], base, torch.float32)
    host = lora_hub.attach(model)
    for index, adapter in enumerate(adapters):
        host.load(adapter, as_=f"adapter{index}")
    host.use({"adapter0": weights[0], "adapter1": weights[1]})
    with torch.no_grad():
        attached = cases[0].run(model)
        merged = cases[0].run(open_base(cases[0], tmp_path / "out", torch.float32))
    assert (merged - attached).abs().max() <= 5e-6 * attached.abs().max()


def test_the_shell_says_what_is_tied_and_unties_it(tmp_path, capsys):
    from lora_hub.cli.main import run

    case = CASES["untied head"]
    base = base_folder(case, tmp_path / "base", torch.float32)
    adapter = adapter_folder(case, tmp_path / "own", open_base(case, base, torch.float32))
    merge = ["merge", str(adapter), "--base", str(base), "--out", str(tmp_path / "out")]

    refused = run(merge)
    told = capsys.readouterr()
    planned = run([*merge, "--untie", "--plan", "--json"])
    plan = json.loads(capsys.readouterr().out)
    merged = run([*merge, "--untie"])

    assert (refused, planned, merged) == (3, 0, 0)
    assert "one tensor for its embedding and its head" in told.err
    assert "--untie" in told.err
    new = [t for shard in plan["shards"] for t in shard["tensors"] if t["action"] == "new"]
    assert [(tensor["name"], tensor["does"]) for tensor in new] == [
        ("lm_head.weight", ["DoRA"])
    ]
    assert "untied: lm_head.weight" in capsys.readouterr().out
