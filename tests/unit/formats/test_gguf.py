"""llama.cpp's file; read back by the gguf package itself and by a permutation by hand."""

import gguf
import numpy as np
import pytest

from lora_hub.errors import FormatError, InputError, LossyConversion
from lora_hub.formats import factors, gguf_base
from lora_hub.formats.gguf import write
from lora_hub.formats.gguf_base import Base
from tests import adapters
from tests.adapters import (
    EMBEDDING,
    GATE_UP,
    HEADS,
    K0,
    KV_HEADS,
    Q0,
    SWITCH,
    TO_Q,
    UP1,
    part,
    source,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    # Mixtral is llama.cpp's "llama" with experts.
    return adapters.language_base(tmp_path_factory.mktemp("base"), model_type="mixtral")


@pytest.fixture
def opened(tmp_path):
    """Return a function: an adapter's file → what the gguf package sees in it."""

    def open_file(files):
        path = tmp_path / "adapter.gguf"
        path.write_bytes(files["adapter.gguf"])
        return gguf.GGUFReader(path)

    return open_file


def rows_as_llama_cpp_has_them(weights, heads):
    """Return the rows of q or k in llama.cpp's order, one row at a time."""
    size = len(weights) // heads
    order = [
        head * size + half * size // 2 + i
        for head in range(heads)
        for i in range(size // 2)
        for half in range(2)
    ]
    return weights[order]


def test_fields_are_those_llama_cpp_asks_for(base, opened):
    reader = opened(adapters.written("gguf", source(part(Q0, alpha=3.0)), base))

    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.type"] == "adapter"
    assert fields["general.architecture"] == "llama"
    assert fields["adapter.type"] == "lora"
    assert fields["adapter.lora.alpha"] == 3.0


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_factors_are_llama_cpps_and_rows_of_q_and_k_are_reordered(dtype, base, opened):
    wanted = [part(target, dtype=dtype, rank=2) for target in (Q0, K0, UP1)]

    reader = opened(adapters.written("gguf", source(*wanted), base))

    found = {tensor.name: tensor for tensor in reader.tensors}
    assert {tensor.tensor_type.name for tensor in reader.tensors} == {dtype}
    for one, name, heads in zip(
        wanted,
        ("blk.0.attn_q", "blk.0.attn_k", "blk.1.ffn_up"),
        (HEADS, KV_HEADS, None),
        strict=True,
    ):
        a, b = (found[f"{name}.weight.lora_{which}"] for which in "ab")
        # ne counts from the other end: (in, rank) and (rank, out).
        assert tuple(a.shape) == (one.a.shape[1], 2)
        assert tuple(b.shape) == (2, one.b.shape[0])
        a, b = (
            adapters.float64(dtype, tuple(reversed(t.shape.tolist())), t.data.tobytes())
            for t in (a, b)
        )
        expected = adapters.delta(one)
        if heads:
            expected = rows_as_llama_cpp_has_them(expected, heads)
        np.testing.assert_array_equal(4.0 / 2 * (b @ a), expected)


def test_qwen_keeps_its_rows(tmp_path, opened):
    base = adapters.language_base(tmp_path / "qwen", model_type="qwen2")
    one = part(Q0)

    reader = opened(adapters.written("gguf", source(one), base))

    assert reader.tensors[1].data.tobytes() == bytes(one.b.data)


def test_unlike_ranks_share_an_alpha(base):
    adapter = source(part(Q0, rank=2, alpha=8), part(UP1, rank=4, alpha=8))

    files = adapters.written("gguf", adapter, base)

    assert adapters.content(adapters.read_back("gguf", files, base=base)) == (
        adapters.content(adapter)
    )


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_power_of_two_of_the_scaling_moves_into_b(dtype, base):
    parts = [
        part(Q0, rank=2, alpha=4, dtype=dtype),
        part(K0, rank=2, alpha=1, dtype=dtype),
        part(UP1, rank=2, alpha=-8, dtype=dtype),
    ]
    adapter = source(*parts)

    result = write(adapter, base)
    found = adapters.read_back("gguf", adapters.written("gguf", adapter, base), base=base)

    assert "a power of two" in result.notes[0]
    for target, expected in adapters.deltas(adapter).items():
        np.testing.assert_array_equal(adapters.deltas(found)[target], expected)


def test_scalings_of_one_at_any_ranks_are_alpha_zero(base, opened):
    adapter = source(part(Q0, rank=3, alpha=3), part(UP1, rank=5, alpha=5))

    reader = opened(adapters.written("gguf", adapter, base))

    assert reader.fields["adapter.lora.alpha"].contents() == 0.0


def huge(target):
    """Return factors whose b is at the end of what float32 holds."""
    from dataclasses import replace

    one = part(target, alpha=16)
    data = np.full(one.b.shape, 3e38, "<f4").tobytes()
    return replace(one, b=replace(one.b, data=data))


LOSSES = [
    ([part(Q0, alpha=2), part(K0, alpha=3)], "no power of two times it"),
    ([part(Q0, alpha=4), part(UP1, alpha=4), huge(K0)], K0),
    ([part(Q0, alpha=0.1)], "no power of two times it"),
    ([part(Q0, rank=8, rule="alpha/sqrt(r)")], "no power of two times it"),
    ([part(Q0, dtype="F64")], "float64"),
    ([part(Q0, dora=True)], "magnitudes (DoRA)"),
    ([part(Q0, bias=True)], "biases beside the factors"),
    ([part(SWITCH, layer="experts", experts=2)], "is no layer of the base that it names"),
    ([part("model.layers.0.wpe", layer="embedding")], "is no layer of the base"),
    ([part(TO_Q)], "is no layer of the base that it names"),
    ([part("model.layers.7.mlp.up_proj")], "no layer of the base"),
]


@pytest.mark.parametrize(("parts", "loss"), LOSSES)
def test_what_llama_cpp_cannot_say_is_refused_with_the_list(parts, loss, base):
    with pytest.raises(LossyConversion) as error:
        adapters.written("gguf", source(*parts), base)

    assert loss in error.value.losses[0]


def test_tied_output_layer_is_refused(tmp_path):
    base = adapters.language_base(tmp_path, tie_word_embeddings=True)

    for one in (part("lm_head"), part(EMBEDDING, layer="embedding")):
        with pytest.raises(LossyConversion, match="lm_head is tied"):
            adapters.written("gguf", source(one), base)


def test_embedding_has_a_row_of_a_for_each_token(base, opened):
    one = part(EMBEDDING, layer="embedding")

    files = adapters.written("gguf", source(one), base)

    found = {tensor.name: tensor for tensor in opened(files).tensors}
    # build_inp_embd takes the rows of lora_a at the tokens, and multiplies by lora_b.
    a, b = (found[f"token_embd.weight.lora_{which}"].data.astype("f8") for which in "ab")
    assert a.shape == (16, 2)
    np.testing.assert_allclose((a @ b.T).T * 2.0, adapters.delta(one), rtol=1e-14)
    assert adapters.content(adapters.read_back("gguf", files, base=base)) == (
        adapters.content(source(one))
    )


def experts(whole_a, whole_b, scaling):
    """Return the deltas of experts, (E, out, in), of llama.cpp's factors."""
    return scaling * (whole_b.astype("f8") @ whole_a.astype("f8"))


def test_experts_are_gate_and_up_by_themselves(base, opened):
    one = part(GATE_UP, layer="experts", experts=3, rank=2, shape=(12, 8), alpha=4)

    files = adapters.written("gguf", source(one), base)

    found = {tensor.name: tensor.data for tensor in opened(files).tensors}
    gate, up = (
        experts(
            found[f"blk.1.ffn_{name}_exps.weight.lora_a"],
            found[f"blk.1.ffn_{name}_exps.weight.lora_b"],
            2.0,
        )
        for name in ("gate", "up")
    )
    a = np.frombuffer(one.a.data, "<f4").reshape(3, 2, 8)
    b = np.frombuffer(one.b.data, "<f4").reshape(12, 2, 3).transpose(2, 0, 1)
    np.testing.assert_array_equal(np.concatenate([gate, up], axis=1), experts(a, b, 2.0))
    assert adapters.content(adapters.read_back("gguf", files, base=base)) == (
        adapters.content(source(one))
    )


@pytest.mark.parametrize("names", [("gate",), ("up",), ("gate", "up")])
@pytest.mark.parametrize("alpha", [0.0, 4.0])
def test_experts_of_unlike_factors_are_stacked(names, alpha, base, tmp_path):
    generator = np.random.default_rng(1)
    tensors, wanted = {}, {"gate": np.zeros((3, 6, 8)), "up": np.zeros((3, 6, 8))}
    for name in names:
        a = generator.uniform(-1, 1, (3, 2, 8)).astype("f4")
        b = generator.uniform(-1, 1, (3, 6, 2)).astype("f4")
        tensors[f"blk.0.ffn_{name}_exps.weight.lora_a"] = a
        tensors[f"blk.0.ffn_{name}_exps.weight.lora_b"] = b
        wanted[name] = experts(a, b, alpha / 2 if alpha else 1.0)

    data = file_of(tmp_path / "x.gguf", tensors, alpha=alpha)
    (found,) = factors.of_source(
        adapters.read_back("gguf", {"adapter.gguf": data}, base=base)
    )

    rank = found.rank
    a = np.frombuffer(found.a.data, "<f4").reshape(3, rank, 8)
    b = np.frombuffer(found.b.data, "<f4").reshape(12, rank, 3).transpose(2, 0, 1)
    assert found.target == GATE_UP.replace(".1.", ".0.")
    np.testing.assert_array_equal(
        experts(a, b, found.scaling), np.concatenate([wanted["gate"], wanted["up"]], axis=1)
    )


def test_both_ways_need_the_base(base):
    files = adapters.written("gguf", source(part(Q0)), base)

    with pytest.raises(FormatError, match="depend on the base"):
        adapters.written("gguf", source(part(Q0)))
    with pytest.raises(FormatError, match="need the base"):
        adapters.read_back("gguf", files)


def test_base_that_is_not_known_or_another_is_refused(base, tmp_path):
    files = adapters.written("gguf", source(part(Q0)), base)
    other = adapters.language_base(tmp_path / "qwen", model_type="qwen2")
    unknown = adapters.language_base(tmp_path / "other", model_type="gpt2")
    broken = adapters.language_base(tmp_path / "broken", num_attention_heads="two")

    with pytest.raises(FormatError, match="architecture 'llama', the base is 'qwen2'"):
        adapters.read_back("gguf", files, base=other)
    with pytest.raises(FormatError, match="model_type is 'gpt2'"):
        adapters.read_back("gguf", files, base=unknown)
    with pytest.raises(InputError, match="num_attention_heads is 'two'"):
        adapters.read_back("gguf", files, base=broken)


def file_of(path, tensors, **fields):
    """Return the bytes of a GGUF by the package alone."""
    alpha = fields.pop("alpha", 4.0)
    stated = {"general.type": "adapter", "adapter.type": "lora", **fields}
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in stated.items():
        if isinstance(value, list):
            writer.add_array(name, value)
        else:
            writer.add_string(name, value)
    writer.add_float32("adapter.lora.alpha", alpha)
    for name, values in tensors.items():
        if isinstance(values, bytes):
            flat = np.frombuffer(values, "u1").reshape(1, -1)
            writer.add_tensor(name, flat, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


A, B = np.zeros((2, 8), "f4"), np.zeros((8, 2), "f4")
UP = "blk.0.ffn_up.weight.lora_"
BAD = {
    "a whole model": (
        {},
        {"general.type": "model"},
        "is a GGUF of a model, expected one of a LoRA adapter",
    ),
    "aLoRA": ({}, {"adapter.alora.invocation_tokens": [1, 2]}, "aLoRA"),
    "nothing": ({}, {}, "holds no factors"),
    "one factor": ({f"{UP}a": A}, {}, "one factor and not the other"),
    "a norm": ({"blk.0.attn_norm.weight": A}, {}, "is no low-rank factor"),
    "quantised": ({f"{UP}a": bytes(34)}, {}, "is Q8_0"),
    "another layer": (
        {"x.weight.lora_a": A, "x.weight.lora_b": B},
        {},
        "no factor of a layer",
    ),
    "an embedding": (
        {"token_embd.weight.lora_a": A, "token_embd.weight.lora_b": B},
        {},
        "of one rank",
    ),
    "experts of one axis": (
        {"blk.0.ffn_up_exps.weight.lora_a": A, "blk.0.ffn_up_exps.weight.lora_b": B},
        {},
        "expected [experts, rank, in]",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_not_read_is_refused_by_name(case, base, tmp_path):
    tensors, fields, problem = BAD[case]
    data = file_of(tmp_path / "x.gguf", tensors, **fields)

    with pytest.raises(FormatError) as error:
        adapters.read_back("gguf", {"adapter.gguf": data}, base=base)

    assert problem in error.value.problem


@pytest.mark.parametrize("length", [0, 4, 8, 24, 40, 100, 200, 300])
def test_file_that_is_cut_off_is_refused(length, base):
    data = adapters.written("gguf", source(part(Q0)), base)["adapter.gguf"][:length]

    with pytest.raises(FormatError, match="no GGUF file that can be read"):
        adapters.read_back("gguf", {"adapter.gguf": data}, base=base)


def test_absent_package_is_said_with_how_to_get_it(base, monkeypatch):
    import sys

    from lora_hub.errors import MissingExtra

    monkeypatch.setitem(sys.modules, "gguf", None)

    with pytest.raises(MissingExtra):
        adapters.written("gguf", source(part(Q0)), base)


TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "num_local_experts": 4,
    "num_experts": 4,
    "head_dim": 8,
    "vocab_size": 64,
    "pad_token_id": 0,
}


@pytest.mark.parametrize("model_type", gguf_base._ARCHITECTURES)
def test_layers_of_every_known_architecture_have_names(model_type):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **TINY))
    known = gguf_base._ARCHITECTURES[model_type]
    architecture = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[known.name]
    table = gguf.get_tensor_name_map(architecture, 2)

    linear = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    experts = [n for n, _ in model.named_parameters() if ".mlp.experts." in n]

    unnamed = {name for name in linear if table.get_name(name) is None}
    # Gemma's output is its embedding: a checkpoint has no lm_head.
    assert unnamed <= ({"lm_head"} if model.config.tie_word_embeddings else set())
    assert bool(experts) == known.has_experts
    base = Base(known.name, 2, known.has_experts, {}, {}, is_tied=False)
    assert all(gguf_base.expert_parts(name, base) for name in experts)


def test_first_half_of_gate_up_is_the_gate_in_transformers():
    import torch
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = MixtralConfig(**TINY)
    layer = MixtralExperts(config)
    with torch.no_grad():
        layer.gate_up_proj.zero_()
        layer.gate_up_proj[:, :64] = -1e4  # silu of a large negative number is zero
        layer.gate_up_proj[:, 64:] = 1.0
        layer.down_proj.fill_(1.0)
    x = torch.ones(3, 32)
    index, weights = torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1)

    assert layer(x, index, weights).abs().max() == 0
