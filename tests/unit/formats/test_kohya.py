"""sd-scripts' file; its `merge_to` computes `lora_up @ lora_down · alpha / dim`."""

import struct

import numpy as np
import pytest

from lora_hub.errors import FormatError, LossyConversion
from tests import adapters
from tests.adapters import PIPELINE, TEXT, TO_OUT, TO_Q, part, source
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
    ({"lycoris_x.lora_down.weight": ("F32", (2, 8))}, "named as LyCORIS does"),
    ({key("lora_down.weight"): ("F32", (2, 8))}, "not the other factor"),
    ({key("hada_w1_a"): ("F32", (2, 8))}, "is LoHa"),
    ({key("lokr_w1"): ("F32", (2, 8))}, "is LoKr"),
    ({key("dora_scale"): ("F32", (8, 1))}, "a magnitude of DoRA"),
    ({key("lora_mid.weight"): ("F32", (2, 2, 3, 3))}, "a convolution in three factors"),
    ({key("diff"): ("F32", (8, 8))}, "a whole weight"),
    ({key("oft_blocks"): ("F32", (8, 8))}, "is OFT"),
    ({key("bent"): ("F32", (8, 8))}, "no low-rank factor of sd-scripts"),
    (
        {
            key("lora_down.weight"): ("F32", (2, 8, 3, 3)),
            key("lora_up.weight"): ("F32", (8, 2, 1, 1)),
        },
        "as for a convolution",
    ),
    ({**PAIR, ALPHA: ("F32", (2,))}, "expected one number"),
    ({**PAIR, "lora_unet_x.alpha": ("F32", ())}, "lora_unet_x has an alpha and no factors"),
    (
        {name.replace("lora_unet_", "lora_unet_lora_unet_"): v for name, v in PAIR.items()},
        "has its prefix twice: a broken conversion",
    ),
    (
        {name.replace("to_q", "to_qq"): v for name, v in PAIR.items()},
        "has no linear layer that sd-scripts would call",
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


LOSSES = [
    ([part(adapters.Q0)], "lies in no component it has a prefix for"),
    ([part("transformer.x")], "lies in no component it has a prefix for"),
    ([part(TO_Q, alpha=0.1)], "no float32 alpha"),
    ([part(TO_Q, alpha=0)], "no float32 alpha"),
    ([part(TO_Q, rule="alpha/sqrt(r)")], "no float32 alpha"),
    ([part("unet.a.b"), part("unet.a_b")], "would both be called lora_unet_a_b"),
]


@pytest.mark.parametrize(("parts", "loss"), LOSSES)
def test_what_kohya_cannot_say_is_refused_with_the_list(parts, loss):
    with pytest.raises(LossyConversion) as error:
        adapters.written("kohya", source(*parts))

    assert loss in error.value.losses[0]
