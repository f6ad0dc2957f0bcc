"""MLX-LM's files; the formula they are compared with is the one in its LoRALinear.fuse."""

import json

import numpy as np
import pytest

from lora_hub.errors import FormatError, LossyConversion
from tests import adapters
from tests.adapters import EMBEDDING, GATE_UP, K0, Q0, SWITCH, TO_Q, UP1, part, source
from tests.builders import tensor_bytes

CONFIG = {
    "fine_tune_type": "lora",
    "num_layers": 4,
    "lora_parameters": {"rank": 2, "scale": 20.0, "dropout": 0.0},
}
TENSORS = {f"{Q0}.lora_a": ("F32", (8, 2)), f"{Q0}.lora_b": ("F32", (2, 8))}


DORA = CONFIG | {"fine_tune_type": "dora"}
SWITCHED = SWITCH.removesuffix(".weight")


def read(config=CONFIG, tensors=TENSORS, **options):
    files = {
        "adapter_config.json": json.dumps(config).encode(),
        "adapters.safetensors": tensor_bytes(tensors),
    }
    return adapters.read_back("mlx", files, **options)


def parameters(**changes):
    stated = {**CONFIG["lora_parameters"], **changes}
    return CONFIG | {"lora_parameters": {k: v for k, v in stated.items() if v is not None}}


def test_delta_is_that_of_mlx_lm():
    wanted = part(Q0, rank=3, alpha=2.0), part(UP1, rank=3, alpha=2.0)

    files = adapters.written("mlx", source(*wanted))

    scale = json.loads(files["adapter_config.json"])["lora_parameters"]["scale"]
    found = adapters.tensors_of(files["adapters.safetensors"])
    for one in wanted:
        a, b = (
            adapters.float64(*(found[f"{one.target}.lora_{which}"][i] for i in (0, 1, 2)))
            for which in "ab"
        )
        assert a.shape == (one.a.shape[1], 3)
        np.testing.assert_array_equal((scale * (b.T @ a.T)), adapters.delta(one))


def test_config_names_what_mlx_lm_asks_for():
    files = adapters.written("mlx", source(part(Q0), part(K0), part("lm_head")))

    assert json.loads(files["adapter_config.json"]) == {
        "fine_tune_type": "lora",
        "lora_parameters": {
            "dropout": 0.0,
            "keys": ["lm_head", "self_attn.k_proj", "self_attn.q_proj"],
            "rank": 2,
            "scale": 2.0,
        },
        "num_layers": -1,
    }


def test_scale_is_not_divided_by_the_rank():
    assert read().updates[0].scaling == 20.0


def test_base_comes_along():
    assert read(CONFIG | {"model": "mlx-community/x"}).base_name == "mlx-community/x"


@pytest.mark.parametrize(
    ("said", "scaling"), [("scale", 20.0), ("alpha", 20.0 * (16 / 2))], ids=str
)
def test_alpha_and_scale_together_mean_what_the_caller_says(said, scaling):
    config = parameters(alpha=16)

    assert read(config, scale_from=said).updates[0].scaling == scaling


def test_alpha_alone_stands_beside_the_old_default_scale():
    config = parameters(alpha=16, scale=None)

    assert read(config, scale_from="alpha").updates[0].scaling == 80.0


BAD = [
    (parameters(alpha=16), TENSORS, "multiplies by scale (20), its first versions by"),
    (parameters(scale=None), TENSORS, "names no scale"),
    (parameters(scale="20"), TENSORS, "scale is '20', expected a number"),
    (parameters(scale=1e400), TENSORS, "expected a finite number"),
    (parameters(rank=3), TENSORS, "the factors have rank 2, adapter_config.json says 3"),
    (parameters(rank=0), TENSORS, "rank is 0"),
    (
        CONFIG | {"lora_parameters": 3},
        TENSORS,
        "lora_parameters is missing or is no object",
    ),
    ({}, TENSORS, "there is no adapter_config.json"),
    (parameters(keys=["self_attn.k_proj"]), TENSORS, "which keys leaves out"),
    (
        CONFIG | {"num_layers": 1},
        TENSORS | {name.replace(".0.", ".1."): value for name, value in TENSORS.items()},
        "num_layers is 1, and the weights reach over 2 layers",
    ),
    (CONFIG, {f"{Q0}.lora_a": ("F32", (8, 2))}, "not the other factor"),
    (CONFIG, {**TENSORS, f"{Q0}.m": ("F32", (8,))}, "fine_tune_type is 'lora'"),
    (DORA, {**TENSORS, f"{Q0}.m": ("F32", (7,))}, "its magnitude is F32 of shape [7]"),
    (DORA, TENSORS, f"'dora', and {Q0} has no magnitude"),
    (DORA, {**TENSORS, f"{K0}.m": ("F32", (8,))}, "a magnitude and no factors"),
    (
        DORA,
        {
            "model.embed_tokens.lora_a": ("F32", (16, 2)),
            "model.embed_tokens.lora_b": ("F32", (2, 8)),
            "model.embed_tokens.m": ("F32", (16,)),
        },
        "a magnitude for each token",
    ),
    (CONFIG, {f"{Q0}.weight": ("F32", (8, 8))}, "no low-rank factor"),
    (
        CONFIG,
        {f"{Q0}.lora_a": ("F32", (4, 2, 8)), f"{Q0}.lora_b": ("F32", (4, 8, 2))},
        "as for experts",
    ),
    (
        CONFIG,
        {
            f"{SWITCHED}.lora_a": ("F32", (4, 2, 8)),
            f"{SWITCHED}.lora_b": ("F32", (3, 8, 2)),
        },
        "expected [experts, rank, in]",
    ),
    (
        CONFIG,
        {f"{Q0}.lora_a": ("F32", (8, 2)), f"{Q0}.lora_b": ("F32", (3, 8))},
        "of one rank",
    ),
    (CONFIG, {f"{Q0}.lora_a": ("I8", (8, 2)), f"{Q0}.lora_b": ("I8", (2, 8))}, "I8 and I8"),
]


@pytest.mark.parametrize(("config", "tensors", "problem"), BAD)
def test_what_is_not_read_is_refused_by_name(config, tensors, problem):
    with pytest.raises(FormatError) as error:
        read(config, tensors)

    assert problem in error.value.problem


LOSSES = [
    ([part(Q0, rank=2, alpha=2), part(K0, rank=4, alpha=4)], "one rank for all"),
    ([part(Q0, alpha=2), part(K0, alpha=4)], "one scale for all"),
    ([part(TO_Q)], "what it calls unet."),
    ([part("transformer.h.0.attn.c_attn")], "what it calls transformer.h.0"),
    ([part(Q0, dtype="F64")], "float64"),
    ([part(Q0, dora=True), part(K0)], "for all targets or none, 1 have one"),
    ([part(Q0, bias=True)], "biases beside the factors"),
    ([part("model.layers.0.conv", layer="conv")], "updates of convolutions"),
    ([part(GATE_UP, layer="experts", experts=2)], "what it calls model.layers.1.mlp"),
]


@pytest.mark.parametrize(("parts", "loss"), LOSSES)
def test_what_mlx_lm_cannot_say_is_refused_with_the_list(parts, loss):
    with pytest.raises(LossyConversion) as error:
        adapters.written("mlx", source(*parts))

    assert loss in error.value.losses[0]
    assert len(error.value.losses) == 1


def test_full_fine_tuning_is_refused_by_name(tmp_path):
    from lora_hub.formats.detect import open_adapter

    config = json.dumps(CONFIG | {"fine_tune_type": "full"})
    (tmp_path / "adapter_config.json").write_text(config)

    with pytest.raises(FormatError, match="whole weights"):
        open_adapter(tmp_path)


def test_dora_is_that_of_mlx_lm():
    wanted = part(Q0, dora=True), part(K0, dora=True)

    files = adapters.written("mlx", source(*wanted))

    found = adapters.tensors_of(files["adapters.safetensors"])
    assert json.loads(files["adapter_config.json"])["fine_tune_type"] == "dora"
    assert found[f"{Q0}.m"] == ("F32", (8,), bytes(wanted[0].magnitude.data))
    assert adapters.content(adapters.read_back("mlx", files)) == (
        adapters.content(source(*wanted))
    )


def test_experts_are_one_matrix_each():
    # As in MLX-LM's LoRASwitchLinear.fuse: weight + scale * lora_b @ lora_a, (E, out, in).
    wanted = part(SWITCH, layer="experts", experts=3, rank=2, shape=(12, 8))

    files = adapters.written("mlx", source(wanted))

    found = adapters.tensors_of(files["adapters.safetensors"])
    a, b = (adapters.float64(*found[f"{SWITCHED}.lora_{which}"]) for which in "ab")
    ours_a = adapters.float64(*of(wanted.a)).reshape(3, 2, 8)
    ours_b = adapters.float64(*of(wanted.b)).reshape(12, 2, 3).transpose(2, 0, 1)
    np.testing.assert_array_equal(b @ a, ours_b @ ours_a)
    assert adapters.content(adapters.read_back("mlx", files)) == (
        adapters.content(source(wanted))
    )


def of(whole):
    return whole.dtype, whole.shape, bytes(whole.data)


def test_embedding_is_told_to_change_a_tied_output_too(tmp_path):
    tensors = {
        f"{EMBEDDING}.lora_a": ("F32", (16, 2)),
        f"{EMBEDDING}.lora_b": ("F32", (2, 8)),
    }
    untied = adapters.language_base(tmp_path)

    found = read(tensors=tensors)

    assert [u.layer for u in found.updates] == ["embedding"]
    assert (found.updates[0].a.shape, found.updates[0].b.shape) == ((2, 16), (8, 2))
    assert found.ties_weights
    assert not read(tensors=tensors, base=untied).ties_weights


def test_embedding_alone_is_written_only_for_a_base_with_an_output_layer(tmp_path):
    adapter = source(part(EMBEDDING, layer="embedding"))

    with pytest.raises(LossyConversion, match="changes a tied output layer too"):
        adapters.written("mlx", adapter)
    files = adapters.written("mlx", adapter, adapters.language_base(tmp_path))

    assert "adapters.safetensors" in files
