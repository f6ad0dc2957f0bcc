"""diffusers' files: three layouts of names, three places for an alpha."""

import json

import pytest

from lora_hub.errors import FormatError, LossyConversion
from lora_hub.formats import diffusers
from lora_hub.formats.base_names import of_component
from lora_hub.formats.dialect import Glance
from lora_hub.tensors.file import TensorFile
from tests import adapters
from tests.adapters import CONV, PIPELINE, Q0, TEXT, TO_OUT, TO_Q, part, source
from tests.builders import tensor_bytes

FILE = "pytorch_lora_weights.safetensors"
ATTENTION = TO_Q.removesuffix(".to_q")
A, B = ("F32", (2, 8)), ("F32", (8, 2))


def read(tensors, metadata=None):
    from lora_hub.tensors.write import chunks_of

    data = tensor_bytes(tensors)
    if metadata is not None:
        held = adapters.tensors_of(data)
        specs = [(name, *value) for name, value in tensors.items()]
        header = {"lora_adapter_metadata": json.dumps(metadata)}
        data = b"".join(map(bytes, chunks_of(specs, lambda n: [held[n][2]], header)))
    return adapters.read_back("diffusers", {FILE: data})


LAYOUTS = {
    "PEFT's names": ({f"{TO_Q}.lora_A.weight": A, f"{TO_Q}.lora_B.weight": B}, TO_Q),
    "lora.down": ({f"{TO_Q}.lora.down.weight": A, f"{TO_Q}.lora.up.weight": B}, TO_Q),
    "processors of a U-Net": (
        {
            f"{ATTENTION}.processor.to_q_lora.down.weight": A,
            f"{ATTENTION}.processor.to_q_lora.up.weight": B,
        },
        TO_Q,
    ),
    "the output of a processor": (
        {
            f"{ATTENTION}.processor.to_out_lora.down.weight": A,
            f"{ATTENTION}.processor.to_out_lora.up.weight": B,
        },
        TO_OUT,
    ),
    "processors without a component": (
        {
            "mid_block.attn1.processor.to_k_lora.down.weight": A,
            "mid_block.attn1.processor.to_k_lora.up.weight": B,
        },
        "unet.mid_block.attn1.to_k",
    ),
    "linear layers of a text encoder": (
        {
            f"{TEXT}.lora_linear_layer.down.weight": A,
            f"{TEXT}.lora_linear_layer.up.weight": B,
        },
        TEXT,
    ),
    "old names of a text encoder": (
        {
            "text_encoder.layers.0.self_attn.to_out_lora.down.weight": A,
            "text_encoder.layers.0.self_attn.to_out_lora.up.weight": B,
        },
        "text_encoder.layers.0.self_attn.out_proj",
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read(layout):
    tensors, target = LAYOUTS[layout]

    (update,) = read(tensors).updates

    assert update.target == target
    assert (update.a.shape, update.b.shape) == ((2, 8), (8, 2))
    assert update.scaling == 1.0  # nothing says an alpha: diffusers takes the rank


PAIR = LAYOUTS["PEFT's names"][0]
TEXT_PAIR = LAYOUTS["linear layers of a text encoder"][0]


def test_config_in_the_header_is_read_as_peft_reads_it():
    found = read(
        {**PAIR, **TEXT_PAIR},
        {
            "unet.r": 2,
            "unet.lora_alpha": 8,
            "unet.target_modules": ["to_q"],
            "text_encoder.r": 2,
            "text_encoder.lora_alpha": 4,
            "text_encoder.use_rslora": True,
            "text_encoder.base_model_name_or_path": None,
        },
    )

    assert {u.target: u.scaling for u in found.updates} == {TEXT: 4 / 2**0.5, TO_Q: 4.0}


def test_alpha_may_be_a_tensor_of_its_own():
    name = f"{TO_Q}.alpha"
    data = tensor_bytes({**PAIR, name: ("F32", ())}, {name: b"\0\0\x40\x40"})

    assert adapters.read_back("diffusers", {FILE: data}).updates[0].scaling == 1.5


def test_header_written_is_what_peft_calls_its_config_by_component():
    adapter = source(
        part(TO_Q, alpha=3, rule="alpha/sqrt(r)"),
        part(TEXT, rank=4, alpha=5, rule="alpha/sqrt(r)"),
    )

    data = adapters.written("diffusers", adapter)[FILE]

    stated = json.loads(adapters.metadata_of(data)["lora_adapter_metadata"])
    assert (stated["unet.lora_alpha"], stated["unet.use_rslora"]) == (3, True)
    assert (stated["text_encoder.r"], stated["text_encoder.lora_alpha"]) == (4, 5)
    assert stated["text_encoder.target_modules"] == [TEXT.partition(".")[2]]
    assert set(adapters.tensors_of(data)) == {
        f"{target}.lora_{which}.weight" for target in (TO_Q, TEXT) for which in "AB"
    }


def test_what_is_written_is_loaded_by_peft_as_a_config():
    from peft import LoraConfig

    adapter = source(part(TO_Q, alpha=3), part(TO_OUT, rank=4, alpha=5))
    data = adapters.written("diffusers", adapter)[FILE]
    stated = json.loads(adapters.metadata_of(data)["lora_adapter_metadata"])

    config = LoraConfig(**{key.removeprefix("unet."): v for key, v in stated.items()})

    assert {config.r, *config.rank_pattern.values()} == {2, 4}


BAD = [
    (
        {**PAIR, f"{TO_OUT}.lora_magnitude_vector": ("F32", (8,))},
        None,
        "has its magnitude and no factors",
    ),
    ({**PAIR, f"{TO_Q}.dora_scale": ("F32", (1, 8))}, None, "another method than DoRA"),
    ({**PAIR, f"{TO_Q}.lora_B.bias": ("F32", (7,))}, None, "its bias is F32 of shape [7]"),
    ({f"{TO_Q}.weight": ("F32", (8, 8))}, None, "in none of its layouts"),
    ({f"{TO_Q}.lora_A.weight": A}, None, "not the other factor"),
    (
        {
            f"{TO_Q}.lora_A.weight": ("F32", (2, 4, 3, 3)),
            f"{TO_Q}.lora_B.weight": ("F32", (8, 2, 3, 1)),
        },
        None,
        "of one rank",
    ),
    ({**PAIR, f"{TO_OUT}.alpha": ("F32", ())}, None, "has its alpha and no factors"),
    ({**PAIR, f"{TO_Q}.alpha": ("F32", (2,))}, None, "expected one number"),
    ({**PAIR, f"{TO_Q}.alpha": ("F32", ())}, {"unet.r": 2}, "the tensors hold alphas too"),
    (
        {
            **PAIR,
            f"{TO_OUT}.lora_A.weight": ("F32", (4, 8)),
            f"{TO_OUT}.lora_B.weight": ("F32", (8, 4)),
        },
        None,
        "depends on the order of its modules",
    ),
    (
        {**PAIR, f"{TO_Q}.alpha": ("F32", ()), f"{TO_Q}.processor.alpha": ("F32", ())},
        None,
        "two tensors are the alpha of",
    ),
    (PAIR, {"unet.r": 4}, "the factors have rank 2, the header says 4"),
    (
        PAIR,
        {"unet.r": 2, "unet.use_dora": True},
        "has no tensor for it, the header says use_dora=True",
    ),
    (PAIR, {"unet.r": 2, "unet.bias": "all"}, "bias='all', which diffusers does not load"),
    (PAIR, {"unet.r": 2, "unet.init_lora_weights": "pissa"}, "changes the base's weights"),
    (PAIR, {"r": 2}, "the key 'r' names no component"),
    (PAIR, {"unet.r": 2, "unet.target_modules": ["to_k"]}, "lists 'to_k'"),
]


@pytest.mark.parametrize(("tensors", "metadata", "problem"), BAD)
def test_what_is_not_read_is_refused_by_name(tensors, metadata, problem):
    with pytest.raises(FormatError) as error:
        read(tensors, metadata)

    assert problem in error.value.problem


def test_alpha_that_only_some_modules_have_is_refused():
    other = {name.replace("to_q", "to_k"): value for name, value in PAIR.items()}

    with pytest.raises(FormatError, match="has no alpha and other modules have one"):
        read({**PAIR, **other, f"{TO_Q}.alpha": ("F32", ())})


def test_target_outside_of_any_component_is_refused_with_the_list():
    with pytest.raises(LossyConversion) as error:
        adapters.written("diffusers", source(part(Q0), part(TO_Q)))

    assert Q0 in error.value.losses[0]


def test_components_of_two_rules_are_read_under_one_where_that_is_exact():
    stated = {"unet.r": 2, "unet.use_rslora": True, "text_encoder.r": 2}

    found = read({**PAIR, **TEXT_PAIR}, {**stated, "unet.lora_alpha": 3})

    assert {update.rule for update in found.updates} == {"alpha/r"}
    assert found.updates[1].scaling == 3 / 2**0.5
    with pytest.raises(FormatError, match="no alpha/rank is the same number"):
        source(part(TO_Q, rank=3, rule="alpha/sqrt(r)", alpha=1.6), part(TO_OUT))


def test_every_target_comes_back():
    adapter = source(*(part(target, rank=r) for r, target in enumerate(PIPELINE, 1)))

    files = adapters.written("diffusers", adapter)

    assert adapters.content(adapters.read_back("diffusers", files)) == (
        adapters.content(adapter)
    )


def test_convolution_bias_and_magnitude_have_pefts_names_and_shapes():
    plain = part(CONV, layer="conv", bias=True)
    scaled = part(TEXT, dora=True)

    data = adapters.written("diffusers", source(plain, scaled))[FILE]

    found = {name: held[:2] for name, held in adapters.tensors_of(data).items()}
    assert found == {
        f"{CONV}.lora_A.weight": ("F32", (2, 8, 3, 3)),
        f"{CONV}.lora_B.weight": ("F32", (8, 2, 1, 1)),
        f"{CONV}.lora_B.bias": ("F32", (8,)),
        f"{TEXT}.lora_A.weight": ("F32", (2, 8)),
        f"{TEXT}.lora_B.weight": ("F32", (8, 2)),
        f"{TEXT}.lora_magnitude_vector": ("F32", (8,)),
    }
    assert adapters.content(adapters.read_back("diffusers", {FILE: data})) == (
        adapters.content(source(plain, scaled))
    )


@pytest.mark.parametrize("kind", ["dora", "bias"])
def test_kind_that_only_some_targets_of_a_component_have_is_refused(kind):
    with pytest.raises(LossyConversion, match="for some targets and not for"):
        adapters.written("diffusers", source(part(TO_Q, **{kind: True}), part(TO_OUT)))


@pytest.mark.parametrize("name", ["lora_magnitude_vector", "dora_scale"])
@pytest.mark.parametrize("shape", [(8,), (8, 1)])
def test_magnitude_is_read_in_the_shapes_that_tools_save(name, shape):
    (update,) = read({**PAIR, f"{TO_Q}.{name}": ("F32", shape)}).updates

    assert update.magnitude.shape == (8,)


@pytest.mark.parametrize(
    "target",
    [
        "transformer.h.0.attn.c_attn",
        "transformer.wte",
        "transformer.blocks.3.attn.Wqkv",
        "transformer.blocks.3.ffn.experts.mlp",
        "transformer.encoder.layers.1.self_attention.query_key_value",
        "transformer.word_embeddings",
    ],
)
def test_a_language_model_whose_layers_lie_in_a_transformer_is_no_pipeline(target):
    names = {f"{target}.lora_A.weight": A, f"{target}.lora_B.weight": B}
    glance = Glance("file.safetensors", b"", header(names))

    assert diffusers.claim_weights(glance) is None
    assert of_component(target) == ("", target)
    with pytest.raises(LossyConversion, match="lies in no component of a pipeline"):
        adapters.written("diffusers", source(part(target, shape=(8, 8))))


@pytest.mark.parametrize(
    "target",
    [
        "transformer.transformer_blocks.0.attn.to_q",
        "transformer.single_transformer_blocks.0.proj_mlp",
        "transformer.blocks.0.attn1.to_q",  # Wan
        "transformer.blocks.0.ffn.net.0.proj",
        "transformer.layers.0.attention.to_q",  # Z-Image
        "transformer.context_embedder",
        "transformer_2.blocks.0.attn1.to_q",
    ],
)
def test_a_transformer_of_a_pipeline_is_a_component(target):
    adapter = source(part(target, shape=(8, 8)))

    again = adapters.read_back("diffusers", adapters.written("diffusers", adapter))

    assert adapters.content(again) == adapters.content(adapter)


def test_a_name_without_component_beside_names_with_one_is_refused():
    other = "mid_block.attn1.to_k"
    names = {
        f"{module}.lora_{which}.weight": shape
        for module in (TO_Q, other)
        for which, shape in (("A", A), ("B", B))
    }

    with pytest.raises(FormatError, match=f"'{other}.* begins with no component"):
        read(names)


def header(tensors):
    return TensorFile.from_bytes(tensor_bytes(tensors), where="file").header
