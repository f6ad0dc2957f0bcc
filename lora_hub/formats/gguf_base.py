"""What llama.cpp calls the layers of a base, and how it orders their rows.

Source: ggml-org/llama.cpp 0b03ada, `convert_hf_to_gguf.py:LlamaModel.permute`, and the
classes beside it; gguf 0.19.0 for the names; transformers 5.23.0, `models/mixtral`,
`models/qwen2_moe`, `models/qwen3_moe`, for the experts.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from lora_hub import strict_json
from lora_hub.errors import FormatError, InputError
from lora_hub.formats import base_names
from lora_hub.formats.matrices import Matrix
from lora_hub.tensors.dtypes import BITS


@dataclass(frozen=True, slots=True)
class _Architecture:
    """How llama.cpp keeps models of one `model_type`.

    Attributes:
        is_reordered: the rows of q and k are in another order.
        has_experts: some blocks have experts, named as transformers 5 does.
    """

    name: str
    is_reordered: bool = False
    has_experts: bool = False


# model_type of config.json → llama.cpp's. Only those whose linear layers keep their rows,
# but for q and k of some.
_ARCHITECTURES = {
    "gemma": _Architecture("gemma"),
    "gemma2": _Architecture("gemma2"),
    "gemma3_text": _Architecture("gemma3"),
    "granite": _Architecture("granite", is_reordered=True),
    "llama": _Architecture("llama", is_reordered=True),
    "mistral": _Architecture("llama", is_reordered=True),
    "mixtral": _Architecture("llama", is_reordered=True, has_experts=True),
    "olmo2": _Architecture("olmo2"),
    "phi3": _Architecture("phi3"),
    "qwen2": _Architecture("qwen2"),
    "qwen2_moe": _Architecture("qwen2moe", has_experts=True),
    "qwen3": _Architecture("qwen3"),
    "qwen3_moe": _Architecture("qwen3moe", has_experts=True),
    "starcoder2": _Architecture("starcoder2"),
}

# The experts of one block in transformers, gate and up one behind the other along the
# outputs, and llama.cpp's names for the parts.
_EXPERTS = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(gate_up_proj|down_proj)")
_EXPERT_PARTS = {
    "gate_up_proj": ("ffn_gate_exps", "ffn_up_exps"),
    "down_proj": ("ffn_down_exps",),
}


@dataclass(frozen=True, slots=True)
class Base:
    """What of the base the names and rows depend on.

    Attributes:
        names: path of a linear module → llama.cpp's name of it.
        heads: last part of a path → heads of its rows, for those in another order.
        layers: how many blocks there are.
        has_experts: some blocks have experts.
        is_tied: the output layer is the embedding, and llama.cpp has no tensor for it.
    """

    architecture: str
    layers: int
    has_experts: bool
    names: Mapping[str, str]
    heads: Mapping[str, int]
    is_tied: bool


def describe(library: ModuleType, folder: Path) -> Base:
    """Return what llama.cpp calls the layers of a base, from its `config.json`.

    Raises:
        FormatError: the architecture is not in the table, or the config is not complete.
            DocumentError: there is none.
    """
    path = folder / "config.json"
    config = strict_json.read_object(path)
    model_type = config.get("model_type")
    known = _ARCHITECTURES.get(model_type) if isinstance(model_type, str) else None
    if known is None:
        raise FormatError(
            f"model_type is {model_type!r}; how llama.cpp keeps it is known for "
            f"{', '.join(sorted(_ARCHITECTURES))}",
            where=str(path),
        )
    heads = _count(config, "num_attention_heads", path)
    # As transformers: without a number of their own, k and v have as many heads as q.
    kv_heads = config.get("num_key_value_heads")
    kv_heads = heads if kv_heads is None else _count(config, "num_key_value_heads", path)
    architecture = next(
        arch for arch, name in library.MODEL_ARCH_NAMES.items() if name == known.name
    )
    layers = _count(config, "num_hidden_layers", path)
    table = library.get_tensor_name_map(architecture, layers)
    modules = base_names.modules_of(folder).get("", {})
    names = {module: table.get_name(module) for module in sorted(modules)}
    return Base(
        architecture=known.name,
        names={module: name for module, name in names.items() if name is not None},
        heads={"q_proj": heads, "k_proj": kv_heads} if known.is_reordered else {},
        layers=layers,
        has_experts=known.has_experts,
        is_tied=base_names.is_tied(folder),
    )


def expert_parts(target: str, base: Base) -> tuple[str, ...]:
    """Return llama.cpp's names for a parameter of experts, in order of its rows."""
    match = _EXPERTS.fullmatch(target)
    if match is None or not base.has_experts or int(match[1]) >= base.layers:
        return ()
    return tuple(f"blk.{int(match[1])}.{part}" for part in _EXPERT_PARTS[match[2]])


def experts_of(base: Base) -> dict[str, tuple[str, int]]:
    """Return llama.cpp's name for experts → the base's parameter, and which part of it."""
    targets = [
        f"model.layers.{layer}.mlp.experts.{part}"
        for layer in range(base.layers)
        for part in _EXPERT_PARTS
    ]
    return {
        name: (target, number)
        for target in targets
        for number, name in enumerate(expert_parts(target, base))
    }


def _count(config: Mapping[str, Any], key: str, path: Path) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(
            f"{key} is {value!r}, expected an integer above 0", where=str(path)
        )
    return value


def reordered(b: Matrix, heads: int, target: str, *, back: bool) -> Matrix:
    """Return b with the rows of each head as llama.cpp has them, or `back` again.

    transformers turns the first half of a head against the second, llama.cpp turns
    neighbours: row (half, i) of a head becomes row (i, half).

    Raises:
        FormatError: the rows are no heads of even size.
    """
    import numpy as np

    rows, columns = b.shape
    if rows % (2 * heads):
        raise FormatError(f"{rows} rows are not {heads} heads of even size", where=target)
    half = rows // heads // 2
    split = (heads, half, 2, columns) if back else (heads, 2, half, columns)
    whole = np.frombuffer(b.data, dtype=f"<u{BITS[b.dtype] // 8}").reshape(split)
    return replace(b, data=np.ascontiguousarray(whole.swapaxes(1, 2)).tobytes())
