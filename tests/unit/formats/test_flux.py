"""FLUX.1 in the names of BFL, ComfyUI, XLabs and sd-scripts: the same rows of each part."""

import struct

import numpy as np
import pytest

from lora_hub.errors import FormatError
from lora_hub.formats.detect import detect, open_adapter
from tests import adapters
from tests.builders import tensor_bytes

HIDDEN = 4
FILE = "pytorch_lora_weights.safetensors"
DOUBLE = "transformer.transformer_blocks.3"
SINGLE = "transformer.single_transformer_blocks.3"

# BFL's layer → (outputs, inputs) in hidden sizes, and diffusers' layers in order of rows.
LAYERS = {
    "double_blocks.3.img_attn.qkv": (
        (3, 1),
        {f"{DOUBLE}.attn.{part}": 1 for part in ("to_q", "to_k", "to_v")},
    ),
    "double_blocks.3.txt_attn.qkv": (
        (3, 1),
        {f"{DOUBLE}.attn.add_{part}_proj": 1 for part in "qkv"},
    ),
    "double_blocks.3.img_attn.proj": ((1, 1), {f"{DOUBLE}.attn.to_out.0": 1}),
    "double_blocks.3.txt_attn.proj": ((1, 1), {f"{DOUBLE}.attn.to_add_out": 1}),
    "double_blocks.3.img_mlp.0": ((4, 1), {f"{DOUBLE}.ff.net.0.proj": 4}),
    "double_blocks.3.txt_mlp.2": ((1, 4), {f"{DOUBLE}.ff_context.net.2": 1}),
    "double_blocks.3.img_mod.lin": ((6, 1), {f"{DOUBLE}.norm1.linear": 6}),
    "single_blocks.3.linear1": (
        (7, 1),
        {
            f"{SINGLE}.attn.to_q": 1,
            f"{SINGLE}.attn.to_k": 1,
            f"{SINGLE}.attn.to_v": 1,
            f"{SINGLE}.proj_mlp": 4,
        },
    ),
    "single_blocks.3.linear2": ((1, 5), {f"{SINGLE}.proj_out": 1}),
    "single_blocks.3.modulation.lin": ((3, 1), {f"{SINGLE}.norm.linear": 3}),
}
STYLES = {
    "BFL": ("", "lora_A.weight", "lora_B.weight"),
    "ComfyUI": ("diffusion_model.", "lora_down.weight", "lora_up.weight"),
    "ComfyUI as PEFT": ("diffusion_model.", "lora_A.weight", "lora_B.weight"),
}


def factors_of(layer, rank=2, dtype="F32"):
    (outputs, inputs), _ = LAYERS[layer]
    shape = (outputs * HIDDEN, inputs * HIDDEN)
    return adapters.part(layer, rank=rank, shape=shape, dtype=dtype)


def named(part, prefix, down, up, *, alpha=None):
    """Return a file with the factors under these names."""
    held = {f"{prefix}.{down}": part.a, f"{prefix}.{up}": part.b}
    tensors = {name: (whole.dtype, whole.shape) for name, whole in held.items()}
    data = {name: bytes(whole.data) for name, whole in held.items()}
    if alpha is not None:
        tensors[f"{prefix}.alpha"] = ("F32", ())
        data[f"{prefix}.alpha"] = struct.pack("<f", alpha)
    return tensor_bytes(tensors, data)


def check(found, part, layer, scaling):
    """Assert that the deltas are the rows of the layer's, part by part."""
    whole = adapters.delta(part) / part.scaling * scaling
    start = 0
    for target, count in LAYERS[layer][1].items():
        stop = start + count * HIDDEN
        np.testing.assert_array_equal(adapters.deltas(found)[target], whole[start:stop])
        start = stop
    assert start == len(whole)
    assert adapters.deltas(found).keys() == LAYERS[layer][1].keys()


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("layer", LAYERS)
def test_rows_of_a_layer_are_those_of_diffusers_layers(layer, style):
    prefix, down, up = STYLES[style]
    part = factors_of(layer)

    data = named(part, f"{prefix}{layer}", down, up, alpha=1.0)
    found = adapters.read_back("diffusers", {FILE: data})

    check(found, part, layer, 0.5)


@pytest.mark.parametrize("layer", LAYERS)
def test_sd_scripts_names_are_found_in_the_base(layer, tmp_path):
    (tmp_path / "transformer").mkdir()
    shapes = {
        f"{target.partition('.')[2]}.weight": ("BF16", (count * HIDDEN, 1))
        for target, count in LAYERS[layer][1].items()
    }
    (tmp_path / "transformer/model.safetensors").write_bytes(tensor_bytes(shapes))
    part = factors_of(layer)
    prefix = f"lora_unet_{layer.replace('.', '_')}"

    data = named(part, prefix, "lora_down.weight", "lora_up.weight", alpha=4.0)
    found = adapters.read_back("kohya", {"lora.safetensors": data}, base=tmp_path)

    check(found, part, layer, 2.0)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("qkv_lora1", "double_blocks.3.img_attn.qkv"),
        ("qkv_lora2", "double_blocks.3.txt_attn.qkv"),
        ("proj_lora1", "double_blocks.3.img_attn.proj"),
        ("proj_lora2", "double_blocks.3.txt_attn.proj"),
    ],
)
def test_xlabs_trains_the_attention_of_double_blocks(name, layer):
    part = factors_of(layer)

    data = named(part, f"double_blocks.3.processor.{name}", "down.weight", "up.weight")
    found = adapters.read_back("diffusers", {FILE: data})

    check(found, part, layer, 1.0)  # nothing says an alpha: the rank


def test_magnitude_of_a_layer_goes_with_its_rows():
    layer = "double_blocks.3.img_attn.qkv"
    part = adapters.part(layer, shape=(3 * HIDDEN, HIDDEN), dora=True)
    held = {"lora_A.weight": part.a, "lora_B.weight": part.b, "dora_scale": part.magnitude}
    tensors = {
        f"{layer}.{name}": (whole.dtype, whole.shape) for name, whole in held.items()
    }
    data = {f"{layer}.{name}": bytes(whole.data) for name, whole in held.items()}

    found = adapters.read_back("diffusers", {FILE: tensor_bytes(tensors, data)})

    vectors = {u.target: found.tensors.read(u.magnitude.name) for u in found.updates}
    wanted = b"".join(vectors[target] for target in LAYERS[layer][1])
    assert wanted == bytes(part.magnitude.data)


def test_layers_of_unlike_ranks_without_alphas_have_the_scaling_one():
    one, two = "double_blocks.3.img_attn.proj", "single_blocks.3.linear2"
    tensors, data = {}, {}
    for layer, rank in ((one, 2), (two, 3)):
        part = factors_of(layer, rank=rank)
        for which, whole in (("A", part.a), ("B", part.b)):
            tensors[f"{layer}.lora_{which}.weight"] = ("F32", whole.shape)
            data[f"{layer}.lora_{which}.weight"] = bytes(whole.data)

    found = adapters.read_back("diffusers", {FILE: tensor_bytes(tensors, data)})

    assert [update.scaling for update in found.updates] == [1.0, 1.0]


def test_file_of_flux_is_detected_and_opened(tmp_path):
    layer = "double_blocks.3.img_attn.qkv"
    data = named(factors_of(layer), layer, "lora_A.weight", "lora_B.weight")
    (tmp_path / "flux.safetensors").write_bytes(data)

    assert detect(tmp_path).dialect.name == "diffusers"
    assert len(open_adapter(tmp_path).updates) == 3


BAD = {
    "an unknown layer": ("double_blocks.0.img_attn.norm", (4, 4), "no layer of FLUX.1's"),
    # FLUX.2's linear1 has q, k, v and twice three hidden sizes.
    "FLUX.2's proportions": ("single_blocks.0.linear1", (36, 4), "this is another model"),
    "rows that are no parts": ("double_blocks.0.img_attn.qkv", (13, 4), "another model"),
    "XLabs' single blocks": ("single_blocks.0.processor.qkv_lora", (12, 4), "no layer of"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_not_known_to_lie_alike_is_refused_by_name(case):
    layer, shape, problem = BAD[case]
    part = adapters.part(layer, shape=shape)
    down, up = ("lora_A.weight", "lora_B.weight")
    if "processor" in layer:
        down, up = ("down.weight", "up.weight")

    with pytest.raises(FormatError) as error:
        adapters.read_back("diffusers", {FILE: named(part, layer, down, up)})

    assert problem in error.value.problem


def test_base_without_the_layer_is_refused(tmp_path):
    (tmp_path / "transformer").mkdir()
    shapes = {"x.weight": ("BF16", (4, 4))}
    (tmp_path / "transformer/model.safetensors").write_bytes(tensor_bytes(shapes))
    layer = "double_blocks.3.img_attn.proj"
    prefix = f"lora_unet_{layer.replace('.', '_')}"
    data = named(factors_of(layer), prefix, "lora_down.weight", "lora_up.weight")

    with pytest.raises(FormatError, match=r"has no layer transformer\.transformer_blocks"):
        adapters.read_back("kohya", {"lora.safetensors": data}, base=tmp_path)
