"""The scaling of every module, over rsLoRA × rank_pattern × alpha_pattern × kind of layer.

PEFT's own layers hold the scaling they multiply with; what is read must be that number,
module by module, whatever the order of tensors in the file.
"""

import copy
import itertools
import json
import random
import warnings

import pytest

from lora_hub.formats.detect import open_adapter
from tests import peft_zoo

# model, targets or parameters → the modules whose rank and alpha a pattern changes
KINDS = {
    "linear": (peft_zoo.llama, {"target_modules": ["q_proj", "v_proj"]}, "v_proj"),
    "Conv1D": (peft_zoo.gpt2, {"target_modules": ["c_attn", "c_proj"]}, "mlp.c_proj"),
    "embedding": (
        peft_zoo.llama,
        {"target_modules": ["embed_tokens", "o_proj"]},
        "embed_tokens",
    ),
    "convolution": (
        peft_zoo.convolutions,
        {"target_modules": ["conv1", "conv2", "conv3"]},
        "conv2",
    ),
    "experts": (
        peft_zoo.mixtral,
        {
            "target_modules": [],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        },
        r"layers\.1\.mlp\.experts\.down_proj",
    ),
}
TABLE = list(itertools.product(KINDS, (False, True), (None, 6), (None, 5.0)))


@pytest.mark.parametrize(("kind", "is_rslora", "rank", "alpha"), TABLE)
def test_every_module_has_the_scaling_that_peft_multiplies_with(
    kind, is_rslora, rank, alpha, tmp_path
):
    theirs = saved(kind, is_rslora, rank, alpha, tmp_path)

    ours = {update.target: update.scaling for update in open_adapter(tmp_path).updates}

    assert ours == theirs
    assert 1.0 not in theirs.values()
    assert len(set(theirs.values())) == (2 if rank or alpha else 1)


@pytest.mark.parametrize("seed", range(3))
def test_a_scaling_belongs_to_its_module_in_whatever_order_the_file_is(seed, tmp_path):
    from safetensors import safe_open

    theirs = saved("linear", True, 6, 5.0, tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    with safe_open(weights, framework="np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    weights.write_bytes(in_order(tensors, random.Random(seed)))

    ours = {update.target: update.scaling for update in open_adapter(tmp_path).updates}

    assert ours == theirs


def saved(kind, is_rslora, rank, alpha, folder):
    """Save an adapter with PEFT; return module or parameter → the scaling PEFT has."""
    from peft import LoraConfig, get_peft_model

    build, targets, changed = KINDS[kind]
    config = LoraConfig(
        r=4,
        lora_alpha=3,
        use_rslora=is_rslora,
        rank_pattern={changed: rank} if rank else {},
        alpha_pattern={changed: alpha} if alpha else {},
        **copy.deepcopy(targets),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(build(), config)
        adapted.save_pretrained(folder, save_embedding_layers=False)
    return {
        path(name, module): module.scaling["default"]
        for name, module in adapted.base_model.model.named_modules()
        if hasattr(module, "lora_variant")
    }


def path(name, module):
    plain = name.replace(".base_layer", "")
    parameter = getattr(module, "parameter_name", None)
    return f"{plain}.{parameter}" if parameter else plain


def in_order(tensors, rng):
    """Return a safetensors file whose header names the tensors in another order."""
    names = sorted(tensors)
    rng.shuffle(names)
    header, data = {}, b""
    for name in names:
        piece = tensors[name].tobytes()
        header[name] = {
            "dtype": "F32",
            "shape": list(tensors[name].shape),
            "data_offsets": [len(data), len(data) + len(piece)],
        }
        data += piece
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data
