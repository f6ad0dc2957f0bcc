"""An adapter for an engine: the same deltas with one scaling, or a refusal by name.

The engines are not installed, so each is played here by the few lines of it that read an
adapter: which scaling it takes for a target, from the config it is given.
"""

import json

import numpy as np
import pytest

from lora_hub.errors import InputError, LossyConversion
from lora_hub.formats.detect import open_adapter
from lora_hub.formats.engines.table import ENGINES
from lora_hub.public.converting import convert
from tests import adapters
from tests.adapters import K0, Q0, part, source
from tests.builders import logits, tiny_adapter, tiny_base, tiny_model

V0 = "model.layers.0.self_attn.v_proj"


def written(folder):
    """Return what lies in a folder: the config, and name → array of float64."""
    from safetensors.torch import load_file

    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    return config, {name: t.double().numpy() for name, t in tensors.items()}


def scalings(engine, config, ranks):
    """Return the scaling that an engine takes for factors of these ranks.

    vLLM 0.30 `PEFTHelper`, SGLang `LoRAAdapter.scaling` and LoRAX `get_scaling_factor`
    read one number from the config; llama.cpp divides by the rank of the tensor.
    """
    if engine == "llama.cpp":
        return {name: config["lora_alpha"] / rank for name, rank in ranks.items()}
    root = engine != "sglang" and config.get("use_rslora", False)
    one = config["lora_alpha"] / (config["r"] ** 0.5 if root else config["r"])
    return dict.fromkeys(ranks, one)


def deltas_in(engine, folder):
    """Return module → delta as the engine computes it from a folder."""
    config, tensors = written(folder)
    pairs = {
        name.removesuffix(".lora_A.weight").removeprefix("base_model.model."): (
            a,
            tensors[name.replace("lora_A", "lora_B")],
        )
        for name, a in tensors.items()
        if name.endswith("lora_A.weight")
    }
    by = scalings(engine, config, {name: len(a) for name, (a, _) in pairs.items()})
    return {name: by[name] * (b @ a) for name, (a, b) in pairs.items()}


def deltas_of_peft(folder, make=tiny_model):
    """Return module → delta as PEFT computes it in float64."""
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    adapted = PeftModel.from_pretrained(make().double(), folder)
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default")
        .detach()
        .numpy()
        for name, module in adapted.named_modules()
        if isinstance(module, LoraLayer)
    }


MIXED = {"rank_pattern": {"v_proj": 3}, "alpha_pattern": {"k_proj": 9}}
KINDS = {
    "plain": {},
    "rslora": {"use_rslora": True, "rank": 3},
    "unlike scalings": {"alpha_pattern": {"v_proj": 16}},
    "unlike ranks": {"rank_pattern": {"v_proj": 5}},
    "all at once": {**MIXED, "use_rslora": True},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", ENGINES)
def test_engine_computes_what_peft_computes(engine, kind, tmp_path):
    lora = {"targets": ("q_proj", "k_proj", "v_proj"), **KINDS[kind]}
    before = tiny_adapter(tmp_path / "before", **lora)

    done = convert(before, "peft", tmp_path / "after", for_=engine)

    expected = deltas_of_peft(before)
    found = deltas_in(engine, tmp_path / "after")
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        assert np.allclose(found[name], delta, rtol=0, atol=1e-6 * np.abs(delta).max())
    assert done.engine == engine


@pytest.mark.parametrize("engine", ENGINES)
def test_peft_loads_it_with_equal_logits(engine, tmp_path):
    from peft import PeftModel

    before = tiny_adapter(tmp_path / "before", targets=("q_proj", "v_proj", "k_proj"))

    convert(before, "peft", tmp_path / "after", for_=engine)

    one, two = (
        logits(PeftModel.from_pretrained(tiny_model(), folder).eval())
        for folder in (before, tmp_path / "after")
    )
    assert np.allclose(one, two, rtol=0, atol=1e-6)


@pytest.mark.parametrize("engine", ["vllm", "llama.cpp"])
@pytest.mark.parametrize("rslora", [False, True])
def test_factors_keep_their_bits_where_the_scalings_are_one(engine, rslora, tmp_path):
    before = tiny_adapter(tmp_path / "before", rank=4, alpha=3, use_rslora=rslora)

    done = convert(before, "peft", tmp_path / "after", for_=engine)

    _, old = written(before)
    config, new = written(tmp_path / "after")
    assert {name: array.tobytes() for name, array in old.items()} == {
        name: array.tobytes() for name, array in new.items()
    }
    assert config["lora_alpha"] / config["r"] == (1.5 if rslora else 0.75)
    assert "use_rslora" not in config
    assert done.error == 0.0


def test_scalings_that_differ_by_powers_of_two_round_nothing_in_bfloat16(tmp_path):
    parts = [part(Q0, alpha=4.0, dtype="BF16"), part(K0, alpha=16.0, dtype="BF16")]
    folder = tmp_path / "before"
    folder.mkdir()
    for name, data in adapters.written("peft", source(*parts)).items():
        (folder / name).write_bytes(data)

    done = convert(folder, "peft", tmp_path / "after", for_="vllm")

    assert done.error == 0.0
    assert any("a power of two each, which is exact" in note for note in done.notes)


def test_rounding_is_told_and_no_larger_than_half_a_unit(tmp_path):
    parts = [part(Q0, alpha=4.0, dtype="BF16"), part(K0, alpha=12.0, dtype="BF16")]
    folder = tmp_path / "before"
    folder.mkdir()
    for name, data in adapters.written("peft", source(*parts)).items():
        (folder / name).write_bytes(data)

    done = convert(folder, "peft", tmp_path / "after", for_="vllm")

    assert 0 < done.error <= 2.0**-8
    assert any("1 were rounded once" in note for note in done.notes)


def test_ranks_become_one_by_zeros_and_the_flag_is_named(tmp_path):
    before = tiny_adapter(tmp_path / "before", rank=2, rank_pattern={"v_proj": 9})

    done = convert(before, "peft", tmp_path / "after", for_="vllm")

    config, tensors = written(tmp_path / "after")
    assert config["r"] == 9
    assert "rank_pattern" not in config
    assert {array.shape[0] for name, array in tensors.items() if "lora_A" in name} == {9}
    assert any("--max-lora-rank 16 or more" in note for note in done.notes)


def test_rank_above_all_that_vllm_takes_is_refused(tmp_path):
    wide = part(Q0, rank=513)
    folder = tmp_path / "before"
    folder.mkdir()
    for name, data in adapters.written("peft", source(wide)).items():
        (folder / name).write_bytes(data)

    with pytest.raises(LossyConversion, match=r"rank is 513, and vLLM takes at most 512"):
        convert(folder, "peft", tmp_path / "after", for_="vllm")


def test_llama_cpp_keeps_unlike_ranks_of_one_alpha(tmp_path):
    before = tiny_adapter(tmp_path / "before", rank=2, rank_pattern={"v_proj": 3})

    done = convert(before, "peft", tmp_path / "after", for_="llama.cpp")

    assert done.error == 0.0
    assert "zeros" not in " ".join(done.notes)


def test_llama_cpp_is_given_gguf_of_unlike_scalings_too(tmp_path):
    base = tiny_base(tmp_path / "base")
    before = tiny_adapter(tmp_path / "before", alpha_pattern={"v_proj": 5})

    with pytest.raises(LossyConversion):
        convert(before, "gguf", tmp_path / "plain", base=base)
    done = convert(before, "gguf", tmp_path / "after", base=base, for_="llama.cpp")

    assert set(done.files) == {"adapter.gguf"}


def test_engine_that_reads_peft_alone_is_given_nothing_else(tmp_path):
    before = tiny_adapter(tmp_path / "before")

    with pytest.raises(InputError, match="vLLM is given peft, not gguf"):
        convert(before, "gguf", tmp_path / "after", for_="vllm")


def test_engine_that_is_none_is_refused(tmp_path):
    with pytest.raises(InputError, match="'tgi' is no engine"):
        convert(tiny_adapter(tmp_path / "a"), "peft", tmp_path / "after", for_="tgi")


# ── modules that an engine must find ─────────────────────────────────────────────────


def test_sglang_gets_zeros_for_k_beside_q_and_v(tmp_path):
    before = tiny_adapter(tmp_path / "before")

    done = convert(before, "peft", tmp_path / "after", for_="sglang")

    found = deltas_in("sglang", tmp_path / "after")
    expected = deltas_of_peft(before)
    assert {name for name in found if name not in expected} == {
        name.replace("q_proj", "k_proj") for name in expected if "q_proj" in name
    }
    assert not any(found[name].any() for name in found.keys() - expected.keys())
    assert any("so they are zeros" in note for note in done.notes)


def test_sglang_needs_the_base_where_only_it_knows_a_shape(tmp_path):
    before = tiny_adapter(tmp_path / "before", targets=("q_proj",))
    base = tiny_base(tmp_path / "base")

    with pytest.raises(LossyConversion) as error:
        convert(before, "peft", tmp_path / "after", for_="sglang")
    done = convert(before, "peft", tmp_path / "after", for_="sglang", base=base)

    assert "--base" in (error.value.hint or "")
    names = {"q_proj", "k_proj", "v_proj"}
    assert set(written(tmp_path / "after")[0]["target_modules"]) == names
    assert done.targets == 3 * len(deltas_of_peft(before))


def test_lorax_gets_zeros_for_layers_that_are_left_alone(tmp_path):
    before = tiny_adapter(tmp_path / "before", layers_to_transform=[1])

    done = convert(before, "peft", tmp_path / "after", for_="lorax")

    found = deltas_in("lorax", tmp_path / "after")
    assert {name.split(".")[2] for name in found} == {"0", "1"}
    assert not any(delta.any() for name, delta in found.items() if ".0." in name)
    assert any("--base makes sure" in note for note in done.notes)


def test_lorax_gets_as_many_layers_as_the_base_has(tmp_path):
    base = tiny_base(tmp_path / "base")
    before = tiny_adapter(tmp_path / "before", layers_to_transform=[0])

    done = convert(before, "peft", tmp_path / "after", for_="lorax", base=base)

    found = deltas_in("lorax", tmp_path / "after")
    assert {name.split(".")[2] for name in found} == {"0", "1"}
    assert not any("makes sure" in note for note in done.notes)


def test_lorax_gets_a_rank_that_it_does_not_raise(tmp_path):
    before = tiny_adapter(tmp_path / "before", rank=5)

    convert(before, "peft", tmp_path / "after", for_="lorax")

    assert written(tmp_path / "after")[0]["r"] == 16


def test_modules_are_named_by_their_last_parts(tmp_path):
    before = tiny_adapter(tmp_path / "before")

    convert(before, "peft", tmp_path / "after", for_="vllm")

    assert written(tmp_path / "after")[0]["target_modules"] == ["q_proj", "v_proj"]


def test_name_of_the_base_and_the_task_are_kept(tmp_path):
    before = tiny_adapter(tmp_path / "before", base_name="tiny-lab/tiny")

    convert(before, "peft", tmp_path / "after", for_="vllm")

    config, _ = written(tmp_path / "after")
    assert config["base_model_name_or_path"] == "tiny-lab/tiny"
    assert open_adapter(tmp_path / "after").task_type == "CAUSAL_LM"
