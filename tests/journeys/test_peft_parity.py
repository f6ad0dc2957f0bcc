"""Each semantics of PEFT on each kind of base in each dtype: attached and merged.

A cell is a base and what PEFT is told. PEFT makes and saves the adapter; ranks are mixed,
r ≠ alpha and no scaling is 1. The truth is `tests/dense.py` in float64 over the numbers as
they stand in the dtype; our error is at most twice that of plain torch in the dtype, and
where PEFT says no, the cell says why.
"""

import copy
import functools
import itertools
import json
import shutil
from dataclasses import dataclass, field, replace

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from safetensors.torch import load_file, save_file

import lora_hub
from lora_hub.errors import FitError, LoraHubError
from lora_hub.public.converting import convert
from tests import peft_zoo
from tests.dense import put_in

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def mixtral():
    """Return experts that all answer: which ones do must not hang on a rounding."""
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=3,
            num_experts_per_tok=3,
            max_position_embeddings=64,
            bos_token_id=1,
            eos_token_id=2,
            experts_implementation="eager",  # torch has no grouped products in float64
        )
    )


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            num_labels=8,
        )
    )


@dataclass(frozen=True)
class Base:
    """A model, and what its parts are called in PEFT's configs."""

    build: object
    targets: tuple  # three, each of an own rank or alpha
    alike: tuple  # targets of one shape, linear
    scaled: tuple  # what IA3 takes, the last as feedforward
    whole: tuple  # modules to save
    expression: str
    excluded: str
    parameters: tuple
    embedding: str = ""
    layers: str = ""
    fields: dict = field(default_factory=dict)
    is_tied: bool = False


BASES = {
    "llama": Base(
        peft_zoo.llama,
        ("q_proj", "v_proj", "down_proj"),
        ("q_proj", "o_proj"),
        ("k_proj", "v_proj", "down_proj"),
        ("lm_head", "norm"),
        r".*\.1\..*\.(q|v|down)_proj",
        "layers.0.self_attn.q_proj",
        ("self_attn.q_proj.weight", "mlp.down_proj.weight"),
        "embed_tokens",
        "layers",
        {"task_type": "CAUSAL_LM"},
    ),
    "gpt2": Base(
        peft_zoo.gpt2,
        ("c_attn", "c_fc", "c_proj"),
        ("attn.c_proj",),
        ("c_attn", "mlp.c_proj"),
        ("ln_f", "0.mlp.c_fc"),
        r".*\.1\.(attn|mlp)\.c_.*",
        "transformer.h.0.attn.c_proj",
        ("attn.c_attn.weight", "attn.c_proj.weight"),
        "wte",
        "h",
        {"fan_in_fan_out": True},
        is_tied=True,
    ),
    "bert": Base(
        bert,
        ("query", "value", "dense"),
        ("query", "value"),
        ("key", "value", "output.dense"),
        ("classifier", "pooler"),
        r".*\.layer\.1\..*(query|dense)",
        "encoder.layer.0.attention.self.query",
        ("self.query.weight", "intermediate.dense.weight"),
        "word_embeddings",
        "layer",
        {"task_type": "SEQ_CLS"},
    ),
    "net": Base(
        peft_zoo.convolutions,
        ("conv1", "conv2", "head.0"),
        ("head.2",),
        ("conv2", "conv3", "head.0"),
        ("head.2", "conv3"),
        r"conv[12]|head\.0",
        "grouped",
        ("head.0.weight", "head.2.weight"),
    ),
    "mixtral": Base(
        mixtral,
        ("q_proj", "v_proj", "o_proj"),
        ("q_proj", "o_proj"),
        ("k_proj", "v_proj", "o_proj"),
        ("lm_head", "norm"),
        r".*\.1\..*\.(q|v|o)_proj",
        "layers.0.self_attn.q_proj",
        ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
        "embed_tokens",
        "layers",
        {"task_type": "CAUSAL_LM"},
    ),
}
BASES["tied llama"] = replace(BASES["llama"], build=peft_zoo.tied_llama, is_tied=True)


def lora(base, *targets, **more):
    """Return a config whose targets differ in rank and alpha; no scaling is 1."""
    names = sorted(targets or base.targets)
    fields = {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": names,
        "rank_pattern": {names[1]: 3},
        "alpha_pattern": {names[0]: 7},
    }
    return LoraConfig(**fields | base.fields | more)


def parameters(base, **more):
    """Return a config for parameters; PEFT has its layers for them as they are stored."""
    one, two = base.parameters
    more |= {"rank_pattern": {two: 3}, "alpha_pattern": {one: 7}, "target_modules": []}
    return lora(base, target_parameters=[one, two], fan_in_fan_out=False, **more)


def other(kind, base, targets, **more):
    task = base.fields.get("task_type")
    return kind(target_modules=list(targets), task_type=task, **more)


# What PEFT is told → its config for a base.
SEMANTICS = {
    "plain": lora,
    "rslora": lambda base: lora(base, use_rslora=True),
    "dora": lambda base: lora(base, use_dora=True),
    "dora, rslora": lambda base: lora(base, use_dora=True, use_rslora=True),
    "lora_bias": lambda base: lora(base, lora_bias=True),
    "bias all": lambda base: lora(base, bias="all"),
    "bias lora_only": lambda base: lora(base, bias="lora_only"),
    "bias all, dora": lambda base: lora(base, bias="all", use_dora=True),
    "bias all, lora_bias": lambda base: lora(base, bias="all", lora_bias=True),
    "modules_to_save": lambda base: lora(base, modules_to_save=list(base.whole)),
    "modules_to_save, dora, bias all": lambda base: lora(
        base, modules_to_save=list(base.whole), use_dora=True, bias="all"
    ),
    "trainable tokens": lambda base: lora(
        base, trainable_token_indices={base.embedding: [3, 17, 5]}
    ),
    "embedding": lambda base: lora(base, base.embedding, *base.targets[:2]),
    "embedding, dora": lambda base: lora(
        base, base.embedding, *base.targets[:2], use_dora=True
    ),
    "embedding, rslora": lambda base: lora(
        base, base.embedding, *base.targets[:2], use_rslora=True
    ),
    # One alpha: a pattern for the embedding would not be one for the head.
    "embedding, tied": lambda base: lora(
        base,
        base.embedding,
        *base.targets[:2],
        ensure_weight_tying=True,
        alpha_pattern={},
    ),
    "modules_to_save, tied": lambda base: lora(
        base, modules_to_save=[base.embedding], ensure_weight_tying=True
    ),
    "layers_to_transform": lambda base: lora(
        base, layers_to_transform=[1], layers_pattern=base.layers
    ),
    "exclude_modules": lambda base: lora(base, exclude_modules=[base.excluded]),
    "an expression": lambda base: lora(base, target_modules=base.expression),
    "all-linear": lambda base: lora(
        base,
        target_modules="all-linear",
        rank_pattern={base.alike[0]: 3},
        alpha_pattern={base.alike[-1]: 7},
    ),
    "target_parameters": parameters,
    "target_parameters, rslora": lambda base: parameters(base, use_rslora=True),
    "ia3": lambda base: other(
        peft.IA3Config,
        base,
        base.scaled,
        feedforward_modules=[base.scaled[-1]],
        fan_in_fan_out="fan_in_fan_out" in base.fields,
    ),
    "vera": lambda base: other(
        peft.VeraConfig,
        base,
        base.alike,
        r=6,
        fan_in_fan_out="fan_in_fan_out" in base.fields,
    ),
    "loha": lambda base: other(peft.LoHaConfig, base, base.targets, r=2, alpha=5),
    "lokr": lambda base: other(peft.LoKrConfig, base, base.targets[1:], r=2, alpha=5),
    "trainable tokens alone": lambda base: peft.TrainableTokensConfig(
        target_modules=[base.embedding], token_indices=[3, 17, 5]
    ),
}

# Cells that PEFT itself does not run, and what it says.
PEFT_REFUSES = {
    ("gpt2", "loha"): "Conv1D.*not supported",
    ("gpt2", "lokr"): "Conv1D.*not supported",
}
WORDS = ("embedding", "token", "tied")


def is_absent(base, semantics):
    """Return whether a base has not what the semantics is about, or shows nothing new."""
    of_words = any(part in semantics for part in WORDS)
    if base == "net":
        return of_words or "layers" in semantics
    if base == "tied llama":
        return not of_words
    # PEFT knows what is tied by names, and GPT-2's wte is not among them.
    return "tied" in semantics


CELLS = [
    pair
    for pair in itertools.product(BASES, SEMANTICS)
    if not is_absent(*pair) and pair not in PEFT_REFUSES
]

# The base has no bias that a merged bias could be added to; PEFT says so, too.
UNMERGEABLE = {
    (base, name)
    for base in ("llama", "mixtral")
    for name in SEMANTICS
    if "lora_bias" in name
}

# PEFT's advice on what is meant here.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{text}")
    for text in (
        "LoRA adapter added to ConvNd layer with groups",
        "Model has `tie_word_embeddings=True` and a tied layer",
        "`lora_bias=True` was passed but the targeted layer",
        "Adapter 'default'.* LoRA tensor.* have invalid shape",
        # It looks among modules; the ranks of parameters are what it says, see below.
        "The following (rank|alpha)_pattern keys did not match",
        "fan_in_fan_out is set to False but the target module is `Conv1D`",
        "Found missing adapter keys while loading the checkpoint",
    )
]


def model(name, *, untied=False):
    """Return the base, the same each time."""
    found = copy.deepcopy(_first(name))
    if untied:
        head = found.lm_head.weight.detach().clone()
        found.lm_head.weight = torch.nn.Parameter(head)
    return found


@functools.cache
def _first(name):
    """Return the base with numbers that are all random, biases and norms too."""
    torch.manual_seed(0)
    found = BASES[name].build()
    with torch.no_grad():
        for path, parameter in found.named_parameters():
            is_gain = parameter.dim() == 1 and path.endswith("weight")
            parameter.normal_(std=0.2).add_(1.0 if is_gain else 0.0)
    return found.eval()


@torch.no_grad()
def answer(found):
    if hasattr(found, "conv1"):
        x = torch.linspace(-1, 1, 32 * 4 * 64).sin().reshape(32, 4, 64)
        return found(x.to(found.conv1.weight.dtype)).double()
    tokens = (torch.arange(32 * 12) * 7 % 31).reshape(32, 12)
    return found(input_ids=tokens).logits.double()


def base_folder(name, folder, dtype):
    found = model(name).to(dtype)
    if hasattr(found, "config"):
        found.save_pretrained(folder)
    else:
        folder.mkdir()
        save_file(found.state_dict(), folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps({"model_type": "net"}))
    return folder


def adapter_folder(name, config, folder):
    torch.manual_seed(1)
    adapted = get_peft_model(model(name), config)
    with torch.no_grad():
        for path, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                is_near_one = "magnitude" in path or "ia3" in path
                change = 0.3 * torch.rand_like(parameter)
                parameter.mul_(1 + change) if is_near_one else parameter.add_(change)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return folder


def cast(folder, dtype):
    """Give the adapter's numbers another dtype; the oracle reads these."""
    path = folder / "adapter_model.safetensors"
    held = load_file(path)
    save_file({key: each.to(dtype) for key, each in held.items()}, path)


def oracle(name, folder, dtype, compute, *, untied):
    """Return the model with the whole change in its weights, computed in a dtype."""
    config = json.loads((folder / "adapter_config.json").read_text())
    return put_in(model(name, untied=untied).to(dtype).to(compute), folder, config)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return a cell's adapter and base in a dtype, each made once."""

    @functools.cache
    def adapter(name, semantics):
        config = SEMANTICS[semantics](BASES[name])
        return adapter_folder(name, config, tmp_path_factory.mktemp("adapter"))

    @functools.cache
    def base(name, dtype):
        return base_folder(name, tmp_path_factory.mktemp("base") / "base", dtype)

    def of(name, semantics, dtype, folder):
        shutil.copytree(adapter(name, semantics), folder)
        cast(folder, dtype)
        return folder, base(name, dtype)

    return of


# Half precision costs what bfloat16 does and shows little more.
WITH_DTYPE = [
    pytest.param(*cell, dtype, marks=pytest.mark.slow if dtype == "float16" else ())
    for cell in CELLS
    for dtype in DTYPES
]


@pytest.mark.parametrize(("name", "semantics", "dtype"), WITH_DTYPE)
def test_attached_and_merged_are_as_exact_as_plain_torch(
    name, semantics, dtype, saved, tmp_path
):
    dtype = DTYPES[dtype]
    adapter, base = saved(name, semantics, dtype, tmp_path / "adapter")
    # The truth changes each of two tied layers by its own update, so it needs both.
    untied = BASES[name].is_tied and semantics.startswith("embedding")
    untie = untied and semantics != "embedding, tied"
    truth = oracle(name, adapter, dtype, torch.float64, untied=untied)
    plain = oracle(name, adapter, dtype, dtype, untied=untied)
    theirs = PeftModel.from_pretrained(
        model(name).to(dtype), adapter, autocast_adapter_dtype=False
    ).eval()
    ours = model(name).to(dtype)
    before = answer(ours)

    host = lora_hub.attach(ours, base=base)
    host.load(adapter, as_="mine")
    host.use("mine")

    exact = answer(truth)
    in_weights, beside = ((answer(one) - exact).norm() for one in (plain, theirs))
    # PEFT means what the truth means, so both ways of plain torch may be measured by.
    assert beside <= 10 * in_weights + torch.finfo(dtype).eps * exact.norm()
    assert (answer(ours) - exact).norm() <= 2 * max(in_weights, beside)
    assert (exact - before).norm() > 0.02 * before.norm()

    merge = functools.partial(
        lora_hub.merge, base, [(adapter, 1.0)], tmp_path / "out", untie=untie
    )
    if (name, semantics) in UNMERGEABLE:
        with pytest.raises(FitError, match="a bias for a layer to which the base gives"):
            merge()
        return
    merge()

    found = load_checkpoint(name, tmp_path / "out")
    own, rounded = ours.state_dict(), plain.state_dict()
    changed = 0
    for key, tensor in truth.state_dict().items():
        allowed = 2 * (rounded[key].double() - tensor).norm()
        assert (found[key].double() - tensor).norm() <= allowed, key
        changed += not torch.equal(found[key], own[key])
    assert changed


def load_checkpoint(name, folder):
    """Return the tensors as the model has them: transformers fuses experts."""
    if name == "net":
        return load_file(folder / "model.safetensors")
    kind = type(_first(name))
    return kind.from_pretrained(folder, dtype="auto").state_dict()


@pytest.mark.parametrize("cell", sorted(PEFT_REFUSES))
def test_what_has_no_cell_peft_does_not_run(cell):
    name, semantics = cell

    with pytest.raises(TypeError, match=PEFT_REFUSES[cell]):
        get_peft_model(model(name), SEMANTICS[semantics](BASES[name]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_an_alora_is_as_exact_as_in_peft_and_never_merged(name, dtype, tmp_path):
    dtype = DTYPES[dtype]
    # Tokens that every row holds, at its own place.
    config = lora(BASES[name], alora_invocation_tokens=[5, 12], task_type="CAUSAL_LM")
    adapter = adapter_folder(name, config, tmp_path / "adapter")
    cast(adapter, dtype)

    def peft_in(compute):
        base = model(name).to(dtype).to(compute)
        theirs = PeftModel.from_pretrained(base, adapter, autocast_adapter_dtype=False)
        return answer(theirs.eval().to(compute))

    ours = model(name).to(dtype)
    before = answer(ours)
    host = lora_hub.attach(ours)
    host.load(adapter, as_="mine")
    host.use("mine")

    exact = peft_in(torch.float64)
    assert (answer(ours) - exact).norm() <= 2 * (peft_in(dtype) - exact).norm()
    assert (exact - before).norm() > 0.02 * before.norm()
    base = base_folder(name, tmp_path / "base", dtype)
    with pytest.raises(LoraHubError, match="aLoRA"):
        lora_hub.merge(base, [(adapter, 1.0)], tmp_path / "out")


@pytest.mark.filterwarnings("ignore:(PiSSA|OLoRA|CorDA) changes the base weights")
@pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted")
@pytest.mark.filterwarnings("ignore:`corda_config` specified but will be ignored")
@pytest.mark.parametrize(
    ("name", "kind"),
    # CorDA measures what layers see, and BERT's pooler sees too little.
    [
        *itertools.product(["llama", "bert", "mixtral"], ["pissa", "olora"]),
        ("llama", "corda"),
        ("mixtral", "corda"),
    ],
)
def test_what_began_in_the_base_is_plain_lora_with_its_beginning(name, kind, tmp_path):
    how = {"corda_config": CordaConfig(corda_method="kpm")} if kind == "corda" else {}
    # Without a task: PEFT's own conversion stumbles over a head that is saved along.
    config = lora(BASES[name], init_lora_weights=kind, task_type=None, **how)
    begun = model(name)
    if kind == "corda":
        tokens = torch.arange(12)[None]  # one text at a time, as PEFT wants it
        preprocess_corda(begun, config, run_model=lambda: begun(input_ids=tokens))
    trained = get_peft_model(begun, config)
    own = trained.peft_config["default"]
    own.init_lora_weights = True
    trained.save_pretrained(tmp_path / "initial", save_embedding_layers=False)
    own.init_lora_weights = kind
    torch.manual_seed(1)
    with torch.no_grad():
        for path, parameter in trained.named_parameters():
            if "lora_" in path:
                parameter.add_(0.3 * torch.rand_like(parameter))
    trained.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    shutil.copytree(tmp_path / "initial", tmp_path / "again")
    trained.save_pretrained(
        tmp_path / "by_peft",
        save_embedding_layers=False,
        path_initial_model_for_weight_conversion=str(tmp_path / "again"),
    )
    convert(tmp_path / "adapter", "peft", tmp_path / "plain", initial=tmp_path / "initial")
    base = base_folder(name, tmp_path / "base", torch.float32)

    ours = model(name)
    host = lora_hub.attach(ours)
    host.load(tmp_path / "plain", as_="mine")
    host.use("mine")
    lora_hub.merge(base, [(tmp_path / "plain", 1.0)], tmp_path / "out")

    folder, wide, narrow = tmp_path / "by_peft", torch.float64, torch.float32
    truth = oracle(name, folder, narrow, wide, untied=False)
    plain = oracle(name, folder, narrow, narrow, untied=False)
    exact, beside = answer(truth), answer(PeftModel.from_pretrained(model(name), folder))
    allowed = max((one - exact).norm() for one in (answer(plain), beside))
    assert (answer(ours) - exact).norm() <= 2 * allowed
    found, rounded = load_checkpoint(name, tmp_path / "out"), plain.state_dict()
    for key, tensor in truth.state_dict().items():
        allowed = 2 * (rounded[key].double() - tensor).norm()
        assert (found[key].double() - tensor).norm() <= allowed, key
