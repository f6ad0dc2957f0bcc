"""A config of every method that PEFT's own comparison trains: taken, or refused by name.

The configs are as their authors wrote them (tests/assets/wild/peft-types). Those that are
taken get the smallest weights that go with them; the refused ones need none.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import peft
import pytest
import safetensors.numpy
import torch

from lora_hub.errors import FormatError, LossyConversion
from lora_hub.formats.detect import open_adapter
from lora_hub.formats.peft_types import NOT_READ, READERS
from lora_hub.public.converting import convert
from tests.builders import logits, tiny_base, tiny_model

TYPES = Path(__file__).parents[1] / "assets/wild/peft-types"
ATTENTION = "base_model.model.model.layers.0.self_attn"
Q, V = f"{ATTENTION}.q_proj", f"{ATTENTION}.v_proj"
MLP = "base_model.model.model.layers.0.mlp"
READ = "read are LORA, ADALORA, IA3, LN_TUNING, LOHA, LOKR, PVERA, TRAINABLE_TOKENS, VERA"

NEAREST = (
    "PEFT's convert_to_lora gives the nearest LoRA, and its merge_and_unload a checkpoint "
    "without adapter"
)
MERGE = "PEFT's merge_and_unload gives a checkpoint without adapter"
NONE = "it works in PEFT alone; nothing turns it into a change of weights"
NOTHING = "no weight of the base changes"
PROMPT = f"trained tokens in front of the input, {NOTHING}"

# file → what the method does, as the message tells it, and the way out
REFUSED = {
    "ADAMSS": ("AdaMSS: subspaces that PEFT computes from the base are trained", MERGE),
    "ADAPTION_PROMPT": (
        f"adaption prompt: trained tokens enter the attention, {NOTHING}",
        NONE,
    ),
    "BEFT": ("BEFT: the value projections got biases of their own", NONE),
    "BOFT": (
        "BOFT: the weight is multiplied by rotations, which is no change of low rank",
        MERGE,
    ),
    "C3A": ("C3A: circulant matrices are added, whose rank is full", NEAREST),
    "DEFT": ("DEFT: a part of the weight is projected away", MERGE),
    "DELORA": ("DeLoRA: the factors are divided by norms, which rounds anew", NEAREST),
    "FOURIERFT": ("FourierFT: a Fourier transform is added, whose rank is full", NEAREST),
    "FROD": ("FRoD: the whole weight is replaced by a product", MERGE),
    "GLORA": ("GLoRA: the change depends on the base's weight and bias", MERGE),
    "GRALORA": (
        "GraLoRA: the factors work by blocks and exchange between them",
        NEAREST,
    ),
    "HIRA": ("HiRA: the factors multiply the weight, number by number", MERGE),
    "HRA": (
        "HRA: the weight is multiplied by reflections, which is no change of low rank",
        MERGE,
    ),
    "LILY": ("Lily: layers share factors, mixed anew for every input", NONE),
    "MISS": ("MiSS: one shared block is added along the inputs", NEAREST),
    "OFT": (
        "OFT: the weight is multiplied by a rotation, which is no change of low rank",
        MERGE,
    ),
    "OSF": ("OSF: the weight's own singular vectors are trained", MERGE),
    "PEANUT": ("PEANuT: a network computes the change from the weight", MERGE),
    "PREFIX_TUNING": (
        f"prefix tuning: trained keys and values in front of the input, {NOTHING}",
        NONE,
    ),
    "PROMPT_TUNING": (f"prompt tuning: {PROMPT}", NONE),
    "PSOFT": ("PSOFT: a rotation stands between factors computed from the base", NEAREST),
    "P_TUNING": (f"P-tuning: {PROMPT}", NONE),
    "RANDLORA": ("RandLoRA: many random factors are added, whose rank is full", NEAREST),
    "ROAD": ("RoAd: the outputs are rotated in pairs", MERGE),
    "SHIRA": ("SHiRA: single numbers are changed, whose rank is full", MERGE),
    "SUPERTUNING": ("super-tuning: single numbers are changed, whose rank is full", MERGE),
    "TINYLORA": ("TinyLoRA: the factors are singular vectors of the base", NEAREST),
    "UNILORA": ("Uni-LoRA: the factors are picked from one shared vector", NEAREST),
    "VBLORA": (
        "VB-LoRA: the factors are mixed from a bank by softmax, which rounds anew",
        NEAREST,
    ),
    "WAVEFT": ("WaveFT: a wavelet transform is added, whose rank is full", NEAREST),
}


def lora(path, rank):
    return {f"{path}.lora_A.weight": (rank, 8), f"{path}.lora_B.weight": (8, rank)}


def ia3(path, shape):
    return {f"{path}.ia3_l": shape}


def hada(path):
    ends = {"a": (1024, 32), "b": (32, 1024)}
    return {f"{path}.hada_w{n}_{end}": ends[end] for n in (1, 2) for end in ends}


def vera(kind, factor):
    lambdas = {f"{kind}_lambda_b": (16,), f"{kind}_lambda_d": (256 * factor,)}
    return {
        **{f"{path}.{name}": shape for path in (Q,) for name, shape in lambdas.items()},
        f"base_model.{kind}_A": (256 * factor, 16),
        f"base_model.{kind}_B": (16, 256),
    }


FLUX = "base_model.model.transformer_blocks.0.attn"
SINGLE = "base_model.model.single_transformer_blocks.0.attn"
FLUX_TARGETS = [
    *(f"{FLUX}.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0", "to_add_out")),
    *(f"{FLUX}.add_{letter}_proj" for letter in "qkv"),
    f"{SINGLE}.to_qkv_mlp_proj",
    "base_model.model.transformer_blocks.0.ff.linear_in",
    "base_model.model.transformer_blocks.0.ff.linear_out",
]

# file → weights (name → shape), then what is read: updates, their ranks, scales, replaced
TAKEN = {
    "ADALORA": (
        {f"{Q}.lora_A": (64, 8), f"{Q}.lora_B": (8, 64), f"{Q}.lora_E": (64, 1)},
        (1, {64}, 0, 0),
    ),
    "IA3": (
        {
            **{
                k: v
                for name in "qkvo"
                for k, v in ia3(f"{ATTENTION}.{name}_proj", (8, 1)).items()
            },
            **ia3(f"{MLP}.gate_proj", (1, 8)),
            **ia3(f"{MLP}.up_proj", (1, 8)),
            **ia3(f"{MLP}.down_proj", (1, 16)),
        },
        (0, set(), 7, 0),
    ),
    "LN_TUNING": (
        {"base_model.model.model.norm.ln_tuning_layers.weight": (8,)},
        (0, set(), 0, 1),
    ),
    "LOHA": ({**hada(Q), **hada(V)}, (2, {1024}, 0, 0)),
    "LOKR": (
        {
            f"{path}.{name}": shape
            for path in (Q, V)
            for name, shape in {
                "lokr_w1": (4, 4),
                "lokr_w2_a": (128, 32),
                "lokr_w2_b": (32, 128),
            }.items()
        },
        (2, {128}, 0, 0),
    ),
    "LORA": (
        {
            k: v
            for name in ("gate", "up", "down")
            for k, v in lora(f"{MLP}.{name}_proj", 10).items()
        },
        (3, {10}, 0, 0),
    ),
    "LORA-use_dora": (
        {
            **{k: v for path in FLUX_TARGETS for k, v in lora(path, 64).items()},
            **{f"{path}.lora_magnitude_vector": (8,) for path in FLUX_TARGETS},
        },
        (11, {64}, 0, 0),
    ),
    "LORA-use_rslora": (lora(Q, 64), (1, {64}, 0, 0)),
    "PVERA": (vera("pvera", 2), (1, {256}, 0, 0)),
    "TRAINABLE_TOKENS": (
        {"base_model.model.model.embed_tokens.trainable_tokens_delta": (2, 8)},
        (0, set(), 0, 1),
    ),
    "VERA": (vera("vera", 1), (1, {256}, 0, 0)),
}


def folder_of(name, folder, weights):
    shutil.copyfile(TYPES / f"{name}.json", folder / "adapter_config.json")
    generator = np.random.default_rng(0)
    tensors = {
        tensor: generator.normal(size=shape).astype(np.float32)
        for tensor, shape in weights.items()
    }
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_every_config_is_in_one_of_the_tables():
    assert {path.stem for path in TYPES.glob("*.json")} == TAKEN.keys() | REFUSED.keys()
    assert not TAKEN.keys() & REFUSED.keys()


@pytest.mark.parametrize("name", sorted(TAKEN))
def test_a_method_that_is_read_is_read_whole(name, tmp_path):
    weights, (updates, ranks, scales, replaced) = TAKEN[name]
    folder = folder_of(name, tmp_path, weights)

    source = open_adapter(folder)

    assert len(source.updates) == updates
    assert {update.rank for update in source.updates} == ranks
    assert len(source.scales) == scales
    assert len(source.replacements) == replaced


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_method_that_is_not_read_is_refused_by_what_it_does(name, tmp_path):
    does, way_out = REFUSED[name]
    # Without weights: what the method is tells more than a file that is missing.
    shutil.copyfile(TYPES / f"{name}.json", tmp_path / "adapter_config.json")

    with pytest.raises(FormatError) as error:
        open_adapter(tmp_path)

    assert error.value.problem == f"peft_type is {name!r} ({does}), which is not read"
    assert error.value.where == str(tmp_path / "adapter_config.json")
    assert error.value.hint == f"{READ}; {way_out}"


@pytest.mark.parametrize(
    ("peft_type", "problem"),
    [
        (None, "peft_type is missing"),
        ("EWORA", "peft_type is 'EWORA', which PEFT 0.21 does not know"),
        (["LORA"], "peft_type is ['LORA'], which PEFT 0.21 does not know"),
        (
            "BONE",
            "peft_type is 'BONE' (Bone: an early MiSS, which PEFT itself reads no more)",
        ),
        (
            "XLORA",
            "peft_type is 'XLORA' (X-LoRA: a classifier mixes adapters for every tok",
        ),
    ],
)
def test_other_types_are_named_too(peft_type, problem, tmp_path):
    config = json.dumps({"peft_type": peft_type, "target_modules": ["q_proj"]})
    (tmp_path / "adapter_config.json").write_text(config)

    with pytest.raises(FormatError) as error:
        open_adapter(tmp_path)

    assert error.value.problem.startswith(problem)


def test_every_type_that_peft_has_is_in_a_table_of_ours():
    known = {"LORA"} | READERS.keys() | NOT_READ.keys()
    assert {peft_type.value for peft_type in peft.PeftType} <= known
    assert not READERS.keys() & NOT_READ.keys()


def trained(config, model, folder):
    torch.manual_seed(1)
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return adapted.eval()


@pytest.mark.parametrize(
    "config",
    [
        peft.LoHaConfig(r=2, alpha=3, target_modules=["q_proj", "down_proj"]),
        peft.LoKrConfig(r=1, alpha=3, target_modules=["q_proj", "down_proj"]),
        peft.VeraConfig(r=3, target_modules=["q_proj", "down_proj"]),
        peft.PveraConfig(r=3, target_modules=["q_proj", "down_proj"]),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_what_is_read_can_be_said_as_lora_and_peft_computes_the_same(config, tmp_path):
    tiny_base(tmp_path / "base")
    adapted = trained(config, tiny_model(), tmp_path / "given")

    convert(tmp_path / "given", "peft", tmp_path / "lora", base=tmp_path / "base")

    again = peft.PeftModel.from_pretrained(tiny_model(), tmp_path / "lora")
    # Two ways of adding in float32; the logits are about 1.
    torch.testing.assert_close(logits(again), logits(adapted), rtol=0, atol=3e-6)


def test_scales_cannot_be_said_as_lora(tmp_path):
    config = peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    trained(config, tiny_model(), tmp_path / "given")

    with pytest.raises(LossyConversion) as error:
        convert(tmp_path / "given", "peft", tmp_path / "lora")

    assert any("(IA3)" in loss for loss in error.value.losses)
    assert not (tmp_path / "lora").exists()
