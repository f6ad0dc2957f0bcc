"""sd-scripts' file; its `merge_to` computes `lora_up @ lora_down · alpha / dim`."""

import struct
from dataclasses import replace

import numpy as np
import pytest

from lora_hub.errors import FormatError, LossyConversion
from lora_hub.formats.matrices import Matrix
from tests import adapters
from tests.adapters import CONV, PIPELINE, TEXT, TO_OUT, TO_Q, part, source
from tests.builders import tensor_bytes

MANGLED = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
PAIR = {
    f"{MANGLED}.lora_down.weight": ("F32", (2, 8)),
    f"{MANGLED}.lora_up.weight": ("F32", (8, 2)),
}
ALPHA = f"{MANGLED}.alpha"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return adapters.pipeline_base(tmp_path_factory.mktemp("base"))


def read(tensors, base, data=None):
    return adapters.read_back(
        "kohya", {"lora.safetensors": tensor_bytes(tensors, data)}, base=base
    )


def test_names_alphas_and_delta_are_those_of_sd_scripts():
    wanted = [part(TO_Q, rank=4, alpha=1), part(TEXT, alpha=3), part(TO_OUT, alpha=0.5)]

    data = adapters.written("kohya", source(*wanted))["lora.safetensors"]

    found = adapters.tensors_of(data)
    assert {name.partition(".")[0] for name in found} == {
        MANGLED,
        MANGLED.replace("to_q", "to_out_0"),
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
    }
    down, up, alpha = (
        adapters.float64(*found[f"{MANGLED}.{name}"])
        for name in ("lora_down.weight", "lora_up.weight", "alpha")
    )
    np.testing.assert_array_equal(float(alpha) / 4 * (up @ down), adapters.delta(wanted[0]))


def test_header_names_the_network_as_sd_scripts_does():
    data = adapters.written("kohya", source(part(TO_Q, alpha=1), part(TEXT, alpha=1)))
    mixed = adapters.written("kohya", source(part(TO_Q, alpha=1), part(TEXT, rank=4)))

    assert adapters.metadata_of(data["lora.safetensors"]) == {
        "ss_network_alpha": "1",
        "ss_network_dim": "2",
        "ss_network_module": "networks.lora",
    }
    assert adapters.metadata_of(mixed["lora.safetensors"])["ss_network_dim"] == "Dynamic"


def test_text_encoders_are_counted_where_there_are_two():
    both = source(part(TEXT), part(TEXT.replace("text_encoder.", "text_encoder_2.")))

    found = adapters.tensors_of(adapters.written("kohya", both)["lora.safetensors"])

    assert {name[:8] for name in found} == {"lora_te1", "lora_te2"}


def test_names_are_unmangled_with_the_modules_of_the_base(base):
    adapter = source(*(part(target) for target in PIPELINE))

    files = adapters.written("kohya", adapter)

    assert adapters.content(adapters.read_back("kohya", files, base=base)) == (
        adapters.content(adapter)
    )


def test_checkpoint_of_one_component_will_do_as_base(base):
    assert read(PAIR, base / "unet").updates[0].target == TO_Q


@pytest.mark.parametrize(
    ("dtype", "data"),
    [
        ("F32", struct.pack("<f", 6)),
        ("F16", struct.pack("<e", 6)),
        ("BF16", struct.pack("<f", 6)[2:]),
        ("I64", struct.pack("<q", 6)),
    ],
)
def test_alpha_is_read_in_whatever_dtype_it_was_saved(dtype, data, base):
    found = read({**PAIR, ALPHA: (dtype, ())}, base, {ALPHA: data})

    assert found.updates[0].scaling == 3.0


def test_absent_alpha_and_alpha_zero_mean_the_rank(base):
    assert read(PAIR, base).updates[0].scaling == 1.0
    assert read({**PAIR, ALPHA: ("F32", ())}, base).updates[0].scaling == 1.0


def key(rest, name=MANGLED):
    return f"{name}.{rest}"


BAD = [
    ({"x.lora_down.weight": ("F32", (2, 8))}, "not named as sd-scripts does"),
    ({"lycoris_x.lora_down.weight": ("F32", (2, 8))}, "has no layer that sd-scripts"),
    ({key("lora_down.weight"): ("F32", (2, 8))}, "not the other factor"),
    ({key("diff"): ("F32", (8, 8))}, "the change of a whole weight (LyCORIS full)"),
    ({key("diff_b"): ("F32", (8,))}, "a change of a bias (LyCORIS full)"),
    ({key("oft_blocks"): ("F32", (8, 8))}, "is OFT: the weight is multiplied"),
    ({key("w_norm"): ("F32", (8,))}, "the weight of a norm"),
    ({key("on_input"): ("F32", (1,))}, "IA3 of LyCORIS"),
    ({key("a1.weight"): ("F32", (8, 2))}, "GLoRA"),
    ({key("bent"): ("F32", (8, 8))}, "no low-rank factor of sd-scripts"),
    (
        {
            key("lora_down.weight"): ("F32", (2, 8, 3, 3)),
            key("lora_up.weight"): ("F32", (8, 2, 1, 1)),
        },
        "a kernel of [3, 3], the base's weight is [8, 8]",
    ),
    ({**PAIR, ALPHA: ("F32", (2,))}, "expected one number"),
    ({**PAIR, "lora_unet_x.alpha": ("F32", ())}, "lora_unet_x has an alpha and no factors"),
    (
        {name.replace("lora_unet_", "lora_unet_lora_unet_"): v for name, v in PAIR.items()},
        "has its prefix twice: a broken conversion",
    ),
    (
        {name.replace("to_q", "to_qq"): v for name, v in PAIR.items()},
        "has no layer that sd-scripts would call",
    ),
]


@pytest.mark.parametrize(("tensors", "problem"), BAD)
def test_what_is_not_read_is_refused_by_name(tensors, problem, base):
    with pytest.raises(FormatError) as error:
        read(tensors, base)

    assert problem in error.value.problem


def test_alpha_that_only_some_modules_have_is_refused(base):
    other = {name.replace("to_q", "to_out_0"): value for name, value in PAIR.items()}

    with pytest.raises(FormatError, match="has no alpha and other modules have one"):
        read({**PAIR, **other, ALPHA: ("F32", ())}, base)


def test_alpha_that_is_no_number_is_refused(base):
    with pytest.raises(FormatError, match="expected a finite number"):
        read({**PAIR, ALPHA: ("F32", ())}, base, {ALPHA: struct.pack("<f", float("nan"))})


def test_without_a_base_the_caller_is_asked():
    with pytest.raises(FormatError, match="only the base's list of modules"):
        read(PAIR, None)


def test_name_that_two_modules_of_the_base_would_have_is_refused(tmp_path):
    twin = TO_Q.replace("transformer_blocks.0", "transformer.blocks.0")
    base = adapters.pipeline_base(tmp_path, twin)

    with pytest.raises(FormatError, match=r"may be unet.* or unet.*: the base has both"):
        read(PAIR, base)


def grouped(target):
    """Return factors of a convolution in two groups."""
    one = part(target, layer="conv", rank=4)
    half = Matrix("F32", (8, 2, 1, 1), bytes(one.b.data)[: 8 * 2 * 4])
    return replace(one, b=half)


LOSSES = [
    ([part(adapters.Q0)], "lies in no component it has a prefix for"),
    ([part("transformer.x")], "lies in no component it has a prefix for"),
    ([part(TO_Q, alpha=0.1)], "no float32 alpha"),
    ([part(TO_Q, alpha=0)], "no float32 alpha"),
    ([part(TO_Q, rule="alpha/sqrt(r)")], "no float32 alpha"),
    ([part(TO_Q, bias=True)], "biases beside the factors"),
    ([part("unet.x", layer="embedding")], "updates of embeddings"),
    ([grouped(CONV)], "is a convolution in groups"),
    ([part("unet.a.b"), part("unet.a_b")], "would both be called lora_unet_a_b"),
]


@pytest.mark.parametrize(("parts", "loss"), LOSSES)
def test_what_kohya_cannot_say_is_refused_with_the_list(parts, loss):
    with pytest.raises(LossyConversion) as error:
        adapters.written("kohya", source(*parts))

    assert loss in error.value.losses[0]


def test_convolution_and_magnitude_are_named_as_lycoris_does():
    one = part(CONV, layer="conv", dora=True)

    data = adapters.written("kohya", source(one))["lora.safetensors"]

    found = {n.partition(".")[2]: held for n, held in adapters.tensors_of(data).items()}
    assert found["lora_down.weight"] == ("F32", (2, 8, 3, 3), bytes(one.a.data))
    assert found["lora_up.weight"] == ("F32", (8, 2, 1, 1), bytes(one.b.data))
    assert found["dora_scale"] == ("F32", (8, 1, 1, 1), bytes(one.magnitude.data))
    assert adapters.metadata_of(data)["ss_network_module"] == "lycoris.kohya"


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 1, 1)])
def test_kernel_of_one_is_read_in_the_shape_of_the_base(shape, tmp_path):
    base = tmp_path / "unet"
    base.mkdir()
    (base / "model.safetensors").write_bytes(tensor_bytes({"x.weight": ("F16", shape)}))
    flat = {
        "lora_unet_x.lora_down.weight": ("F32", (2, 8)),
        "lora_unet_x.lora_up.weight": ("F32", (8, 2)),
    }
    deep = {name: (dtype, (*held, 1, 1)) for name, (dtype, held) in flat.items()}

    for tensors in (flat, deep):
        (update,) = read(tensors, tmp_path).updates

        assert update.layer == ("conv" if len(shape) == 4 else "linear")
        assert update.a.shape == (2, 8, *shape[2:])


def sdxl(folder):
    """Fill a folder with a pipeline whose U-Net has three blocks, as SDXL's."""
    paths = {
        "down_blocks.0.resnets.1.conv2": (8, 8, 3, 3),
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": (8, 8),
        "down_blocks.2.attentions.1.proj_in": (8, 8),
        "down_blocks.0.downsamplers.0.conv": (8, 8, 3, 3),
        "mid_block.attentions.0.transformer_blocks.0.ff.net.2": (8, 8),
        "up_blocks.0.upsamplers.0.conv": (8, 8, 3, 3),
        "up_blocks.1.attentions.2.proj_out": (8, 8),
        "time_embedding.linear_1": (8, 8),
        "add_embedding.linear_2": (8, 8),
    }
    (folder / "unet").mkdir(parents=True)
    tensors = {f"{path}.weight": ("F16", shape) for path, shape in paths.items()}
    (folder / "unet/model.safetensors").write_bytes(tensor_bytes(tensors))
    return folder


SDXL = {
    "input_blocks_2_0_out_layers_3": "down_blocks.0.resnets.1.conv2",
    "input_blocks_4_1_transformer_blocks_0_attn1_to_q": (
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    ),
    "input_blocks_8_1_proj_in": "down_blocks.2.attentions.1.proj_in",
    "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
    "middle_block_1_transformer_blocks_0_ff_net_2": (
        "mid_block.attentions.0.transformer_blocks.0.ff.net.2"
    ),
    "output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks_5_1_proj_out": "up_blocks.1.attentions.2.proj_out",
    "time_embed_0": "time_embedding.linear_1",
    "label_emb_0_2": "add_embedding.linear_2",
}


@pytest.mark.parametrize("name", SDXL)
def test_names_of_sdxl_are_those_of_stabilitys_own_unet(name, tmp_path):
    base = sdxl(tmp_path)
    kernel = {"conv": (3, 3), "conv2": (3, 3)}.get(SDXL[name].rpartition(".")[2], ())
    ones = tuple(1 for _ in kernel)
    tensors = {
        f"lora_unet_{name}.lora_down.weight": ("F32", (2, 8, *kernel)),
        f"lora_unet_{name}.lora_up.weight": ("F32", (8, 2, *ones)),
    }

    assert read(tensors, base).updates[0].target == f"unet.{SDXL[name]}"


def test_names_of_stabilitys_unet_are_of_sdxl_alone(base):
    tensors = {
        key.replace(MANGLED, "lora_unet_input_blocks_1_1_proj_in"): value
        for key, value in PAIR.items()
    }

    with pytest.raises(FormatError, match="has no layer that sd-scripts would call"):
        read(tensors, base)


def test_lycoris_of_any_model_is_found_in_its_checkpoint(tmp_path):
    base = adapters.language_base(tmp_path)
    mangled = "lycoris_model_layers_0_self_attn_q_proj"
    tensors = {name.replace(MANGLED, mangled): value for name, value in PAIR.items()}

    assert read(tensors, base).updates[0].target == adapters.Q0
