"""llama.cpp's file; read back by the gguf package itself and by a permutation by hand."""

import gguf
import numpy as np
import pytest

from lora_hub.errors import FormatError, InputError, LossyConversion
from lora_hub.formats.gguf import write
from tests import adapters
from tests.adapters import HEADS, K0, KV_HEADS, Q0, TO_Q, UP1, part, source


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return adapters.language_base(tmp_path_factory.mktemp("base"))


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
    ([part(TO_Q)], "no linear layer of the base that it names"),
    ([part("model.layers.7.mlp.up_proj")], "no linear layer of the base"),
]


@pytest.mark.parametrize(("parts", "loss"), LOSSES)
def test_what_llama_cpp_cannot_say_is_refused_with_the_list(parts, loss, base):
    with pytest.raises(LossyConversion) as error:
        adapters.written("gguf", source(*parts), base)

    assert loss in error.value.losses[0]


def test_tied_output_layer_is_refused(tmp_path):
    base = adapters.language_base(tmp_path, tie_word_embeddings=True)

    with pytest.raises(LossyConversion, match="lm_head is tied"):
        adapters.written("gguf", source(part("lm_head")), base)


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
    stated = {"general.type": "adapter", "adapter.type": "lora", **fields}
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in stated.items():
        if isinstance(value, list):
            writer.add_array(name, value)
        else:
            writer.add_string(name, value)
    writer.add_float32("adapter.lora.alpha", fields.pop("alpha", 4.0))
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
    "a whole model": ({}, {"general.type": "model"}, "is a GGUF of 'model'"),
    "aLoRA": ({}, {"adapter.alora.invocation_tokens": [1, 2]}, "aLoRA"),
    "nothing": ({}, {}, "holds no factors"),
    "one factor": ({f"{UP}a": A}, {}, "one factor and not the other"),
    "a norm": ({"blk.0.attn_norm.weight": A}, {}, "no factor of a linear layer"),
    "quantised": ({f"{UP}a": bytes(34)}, {}, "is Q8_0"),
    "an embedding": (
        {"token_embd.weight.lora_a": A, "token_embd.weight.lora_b": B},
        {},
        "is an embedding",
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
