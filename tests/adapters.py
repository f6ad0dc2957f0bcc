"""Adapters in memory and tiny bases, for tests of the dialects. Made without torch."""

import json
import math
import struct

import numpy as np

from lora_hub.formats import factors
from lora_hub.formats.detect import DIALECTS
from lora_hub.formats.dialect import Given, ReadOptions
from lora_hub.formats.factors import Factors
from lora_hub.formats.matrices import Matrix
from tests.builders import tensor_bytes

SIZES = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}
HIDDEN, OUT, HEADS, KV_HEADS = 8, 12, 2, 1

Q0 = "model.layers.0.self_attn.q_proj"
K0 = "model.layers.0.self_attn.k_proj"
UP1 = "model.layers.1.mlp.up_proj"
LANGUAGE = (Q0, K0, UP1)

TO_Q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
TO_OUT = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
TEXT = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
CONV = "unet.down_blocks.0.resnets.0.conv1"
# target → kernel
CONVS = {CONV: (3, 3), "unet.down_blocks.0.resnets.0.conv_shortcut": (1, 1)}
EMBEDDING = "model.embed_tokens"
SWITCH = "model.layers.1.mlp.switch_mlp.gate_proj.weight"  # experts as MLX-LM has them
GATE_UP = "model.layers.1.mlp.experts.gate_up_proj"  # and as transformers has
PIPELINE = (TO_Q, TO_OUT, TEXT)

# path within the base → (out, in)
LANGUAGE_SHAPES = {
    **{f"model.layers.{n}.self_attn.q_proj": (HIDDEN, HIDDEN) for n in (0, 1)},
    **{f"model.layers.{n}.self_attn.k_proj": (4, HIDDEN) for n in (0, 1)},
    **{f"model.layers.{n}.mlp.up_proj": (OUT, HIDDEN) for n in (0, 1)},
    "model.embed_tokens": (16, HIDDEN),
    "lm_head": (16, HIDDEN),
}


def part(
    target,
    *,
    rank=2,
    alpha=4.0,
    rule="alpha/r",
    dtype="F32",
    seed=0,
    shape=(HIDDEN, HIDDEN),
    layer="linear",
    kernel=(3, 3),
    experts=1,
    dora=False,
    bias=False,
):
    """Return factors of small random numbers; their bytes are valid in the dtype."""
    out, inp = LANGUAGE_SHAPES.get(target, shape)
    generator = np.random.default_rng([seed, *target.encode()])
    a, b = (rank, inp), (out, rank)
    if layer == "embedding":
        a, b = (rank, out), (inp, rank)  # stored as (num_embeddings, embedding_dim)
    elif layer == "conv":
        a, b = (rank, inp, *kernel), (out, rank, *(1 for _ in kernel))
    elif layer == "experts":
        a, b = (experts * rank, inp), (out, rank * experts)

    def matrix(shape):
        return Matrix(dtype, shape, numbers(generator, math.prod(shape), dtype))

    return Factors(
        target,
        alpha,
        rule,
        matrix(a),
        matrix(b),
        layer=layer,
        experts=experts,
        magnitude=matrix(b[:1]) if dora else None,
        bias=matrix(b[:1]) if bias else None,
    )


def numbers(generator, count, dtype):
    """Return the bytes of so many numbers between -1 and 1."""
    values = generator.uniform(-1, 1, count)
    if dtype == "BF16":
        return (values.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    return values.astype({"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype]).tobytes()


def source(*parts, base_name=None):
    return factors.to_source(parts, where="adapter", base_name=base_name)


def language_base(folder, *, model_type="llama", **config):
    """Fill a folder with the headers of a tiny language model, its weights zero."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = {
        "model_type": model_type,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "num_hidden_layers": 2,
    }
    (folder / "config.json").write_text(json.dumps(plain | config))
    tensors = {f"{name}.weight": ("BF16", shape) for name, shape in LANGUAGE_SHAPES.items()}
    tensors["model.norm.weight"] = ("BF16", (HIDDEN,))
    (folder / "model.safetensors").write_bytes(tensor_bytes(tensors))
    return folder


def pipeline_base(folder, *more):
    """Fill a folder with the components of a tiny pipeline; `more` are further targets."""
    for component in ("unet", "text_encoder"):
        (folder / component).mkdir(parents=True, exist_ok=True)
        tensors = {
            f"{target.partition('.')[2]}.weight": ("F16", (HIDDEN, HIDDEN))
            for target in (*PIPELINE, *more)
            if target.startswith(f"{component}.")
        }
        tensors["conv_in.weight"] = ("F16", (4, 4, 3, 3))
        if component == "unet":
            for target, kernel in CONVS.items():
                name = f"{target.partition('.')[2]}.weight"
                tensors[name] = ("F16", (HIDDEN, HIDDEN, *kernel))
        (folder / component / "model.safetensors").write_bytes(tensor_bytes(tensors))
    return folder


def written(dialect, adapter, base=None):
    """Return file name → bytes of an adapter in a dialect."""
    files = DIALECTS[dialect].write(adapter, base).files
    return {name: b"".join(map(bytes, chunks)) for name, chunks in files.items()}


def read_back(dialect, files, **options):
    """Return the adapter in such files."""
    row = DIALECTS[dialect]
    config = files.get("adapter_config.json")
    given = Given(
        where="adapter",
        weights_name=row.weights_name,
        weights=files[row.weights_name],
        config=json.loads(config) if config else {},
    )
    return row.read(given, ReadOptions(**options))


def content(adapter):
    """Return target → scaling, layer, experts; and of each tensor dtype, shape, bytes."""
    return {
        found.target: (
            found.scaling,
            found.layer,
            found.experts,
            {
                name: (whole.dtype, whole.shape, bytes(whole.data))
                for name, whole in found.matrices.items()
            },
        )
        for found in factors.of_source(adapter)
    } | {"ties": adapter.ties_weights}


def tensors_of(data):
    """Return name → (dtype, shape, bytes) of a safetensors file, read by hand."""
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    header.pop("__metadata__", None)
    body = data[8 + size :]
    return {
        name: (entry["dtype"], tuple(entry["shape"]), body[slice(*entry["data_offsets"])])
        for name, entry in header.items()
    }


def metadata_of(data):
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]).get("__metadata__")


def float64(dtype, shape, data):
    """Return the numbers of a tensor, by hand."""
    if dtype == "BF16":
        wide = np.frombuffer(data, "<u2").astype("<u4") << 16
        return wide.view("<f4").astype("f8").reshape(shape)
    kinds = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}
    return np.frombuffer(data, kinds[dtype]).astype("f8").reshape(shape)


def delta(part):
    """Return the dense change of a target in float64: scaling · b @ a."""
    a, b = (float64(w.dtype, w.shape, bytes(w.data)) for w in (part.a, part.b))
    return part.scaling * (b.reshape(len(b), -1) @ a.reshape(len(a), -1))


def deltas(adapter):
    return {found.target: delta(found) for found in factors.of_source(adapter)}
