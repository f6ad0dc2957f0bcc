"""llama.cpp's LoRA in a GGUF file, through the `gguf` package, both ways.

Tensors have llama.cpp's names (`blk.0.attn_q.weight.lora_a`), which the base's
architecture gives them, so both ways need the base. llama.cpp keeps the rows of q and k of
Llama in another order, which the rows of b follow. One alpha stands for all tensors; their
scaling is alpha/rank, and 1 where alpha is 0.

Where no one alpha is right for all, b takes up the ratio if that is a power of two, which
moves exponents and rounds nothing. Any other adapter is refused.

Source: ggml-org/llama.cpp 0b03ada, `convert_lora_to_gguf.py`, and
`convert_hf_to_gguf.py:LlamaModel.permute`; `src/llama-adapter.cpp` for the scaling.
"""

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from lora_hub import extras, strict_json
from lora_hub.errors import FormatError, InputError
from lora_hub.formats import base_names, factors
from lora_hub.formats.dialect import Given, Glance, ReadOptions, Written
from lora_hub.formats.factors import Factors, Matrix
from lora_hub.formats.gguf_bounds import check_bounds
from lora_hub.formats.source import AdapterSource
from lora_hub.tensors import arrays
from lora_hub.tensors.dtypes import BITS

WEIGHTS_NAME = "adapter.gguf"
MAGIC = b"GGUF"
SAYS = frozenset({"language", "ranks"})

# What llama.cpp multiplies by; it has no kernels for float64.
_DTYPES = ("BF16", "F16", "F32")


@dataclass(frozen=True, slots=True)
class _Architecture:
    """How llama.cpp keeps models of one `model_type`; q and k may be in another order."""

    name: str
    is_reordered: bool = False


# model_type of config.json → llama.cpp's. Only those whose linear layers keep their rows,
# but for q and k of Llama.
_ARCHITECTURES = {
    "gemma": _Architecture("gemma"),
    "gemma2": _Architecture("gemma2"),
    "llama": _Architecture("llama", is_reordered=True),
    "mistral": _Architecture("llama", is_reordered=True),
    "qwen2": _Architecture("qwen2"),
    "qwen3": _Architecture("qwen3"),
}


@dataclass(frozen=True, slots=True)
class _Base:
    """What of the base the names and rows depend on.

    Attributes:
        names: path of a linear module → llama.cpp's name of it.
        heads: last part of a path → heads of its rows, for those in another order.
        is_tied: the output layer is the embedding, and llama.cpp has no tensor for it.
    """

    architecture: str
    names: Mapping[str, str]
    heads: Mapping[str, int]
    is_tied: bool


def claim_weights(glance: Glance) -> str | None:
    return "it begins with the bytes GGUF" if glance.magic.startswith(MAGIC) else None


def read(given: Given, options: ReadOptions) -> AdapterSource:
    """Return the adapter under the names that its modules have in the base.

    Raises:
        FormatError: no base was given, the file is no plain LoRA for its architecture, or
            a tensor is quantised or of no linear layer.
        MissingExtra: the `gguf` package is not installed.
    """
    where = given.weights_where
    library = extras.require("gguf", extra="demo")
    check_bounds(given.weights, where)
    fields, tensors = _contents(library, given.weights, where)
    kinds = fields.get("general.type"), fields.get(library.Keys.Adapter.TYPE)
    if kinds != ("adapter", "lora"):
        raise FormatError(f"is a GGUF of {kinds[0]!r}, {kinds[1]!r}, no LoRA", where=where)
    if fields.get(library.Keys.Adapter.ALORA_INVOCATION_TOKENS):
        raise FormatError("acts only behind an invocation text (aLoRA)", where=where)
    alpha = _alpha(fields.get(library.Keys.Adapter.LORA_ALPHA, 0.0), where)
    if options.base is None:
        raise FormatError(
            "names of llama.cpp are others than the base's, and its q and k have another "
            "order of rows: both need the base",
            where=where,
            hint="give the folder of the base with `lorahub convert … --base`",
        )
    base = _base(library, options.base)
    stated = fields.get("general.architecture")
    if stated != base.architecture:
        raise FormatError(
            f"is for the architecture {stated!r}, the base is {base.architecture!r}",
            where=where,
        )
    modules = {name: module for module, name in base.names.items()}
    halves: dict[str, dict[str, Matrix]] = {}
    for name, whole in tensors.items():
        stem, _, which = name.rpartition(".lora_")
        module = modules.get(stem.removesuffix(".weight"))
        if which not in ("a", "b") or module is None:
            raise FormatError(
                f"the tensor {name!r} is no factor of a linear layer of the base",
                where=where,
            )
        halves.setdefault(module, {})[which] = whole
    parts = []
    for target, half in halves.items():
        if len(half) != 2:
            raise FormatError(f"{target} has one factor and not the other", where=where)
        a, b = half["a"], half["b"]
        factors.check_factors(target, a, b, where)
        heads = base.heads.get(_last(target))
        b = _reordered(b, heads, target, back=True) if heads else b
        # 0 means that nothing but the user's own factor scales.
        parts.append(Factors(target, alpha or float(a.shape[0]), "alpha/r", a, b))
    if not parts:
        raise FormatError("the file holds no factors", where=where)
    return factors.to_source(parts, where=where)


def write(source: AdapterSource, base: Path | None = None) -> Written:
    """Return the file that `llama-cli --lora` takes.

    Raises:
        FormatError: no base was given, or its architecture is not known here.
        LossyConversion: a target has no name in llama.cpp, factors are float64, or no
            alpha and no powers of two say the scalings.
        MissingExtra: the `gguf` package is not installed.
    """
    if base is None:
        raise FormatError(
            "llama.cpp's names and its order of rows depend on the base",
            hint="give the folder of the base with `lorahub convert … --base`",
        )
    library = extras.require("gguf", extra="demo")
    known = _base(library, base)
    parts = factors.of_source(source)
    losses = _unsaid(parts, known)
    alpha, ratios = _fold(parts)
    folded, inexact = {}, []
    for part in parts:
        ratio = ratios.get(part.target)
        b = part.b if ratio == 1 else None if ratio is None else _times(part.b, ratio)
        if b is None:
            inexact.append(part.target)
        else:
            folded[part.target] = replace(part, b=b)
    if inexact:
        losses.append(
            "one alpha for all targets, and no power of two times it is the scaling of "
            f"{factors.some(inexact)}"
        )
    factors.refuse(losses, "llama.cpp")
    tensors = {}
    for part in folded.values():
        heads = known.heads.get(_last(part.target))
        b = _reordered(part.b, heads, part.target, back=False) if heads else part.b
        tensors[f"{known.names[part.target]}.weight.lora_a"] = part.a
        tensors[f"{known.names[part.target]}.weight.lora_b"] = b
    moved = [part.target for part in parts if ratios[part.target] != 1]
    note = f"a power of two of the scaling moved into b of {factors.some(moved)}"
    data = _encode(library, known.architecture, alpha, tensors)
    return Written({WEIGHTS_NAME: (data,)}, (note,) if moved else ())


# ── the base ─────────────────────────────────────────────────────────────────────────


def _base(library: ModuleType, folder: Path) -> _Base:
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
    table = library.get_tensor_name_map(
        architecture, _count(config, "num_hidden_layers", path)
    )
    modules = base_names.modules_of(folder).get("", frozenset())
    names = {module: table.get_name(module) for module in sorted(modules)}
    return _Base(
        architecture=known.name,
        names={module: name for module, name in names.items() if name is not None},
        heads={"q_proj": heads, "k_proj": kv_heads} if known.is_reordered else {},
        is_tied=config.get("tie_word_embeddings") is True,
    )


def _count(config: Mapping[str, Any], key: str, path: Path) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(
            f"{key} is {value!r}, expected an integer above 0", where=str(path)
        )
    return value


def _reordered(b: Matrix, heads: int, target: str, *, back: bool) -> Matrix:
    """Return b with the rows of each head as llama.cpp has them, or `back` again.

    transformers turns the first half of a head against the second, llama.cpp turns
    neighbours: row (half, i) of a head becomes row (i, half).
    """
    import numpy as np

    rows, columns = b.shape
    if rows % (2 * heads):
        raise FormatError(f"{rows} rows are not {heads} heads of even size", where=target)
    half = rows // heads // 2
    split = (heads, half, 2, columns) if back else (heads, 2, half, columns)
    whole = np.frombuffer(b.data, dtype=f"<u{BITS[b.dtype] // 8}").reshape(split)
    return replace(b, data=np.ascontiguousarray(whole.swapaxes(1, 2)).tobytes())


def _last(target: str) -> str:
    return target.rpartition(".")[2]


# ── scalings ─────────────────────────────────────────────────────────────────────────


def _unsaid(parts: Sequence[Factors], base: _Base) -> list[str]:
    losses = []
    unnamed = [part.target for part in parts if part.target not in base.names]
    if unnamed:
        losses.append(
            f"{factors.some(unnamed)} is no linear layer of the base that it names"
        )
    if base.is_tied and any(part.target == "lm_head" for part in parts):
        losses.append("the base has no output layer of its own to change (lm_head is tied)")
    if any(part.a.dtype not in _DTYPES for part in parts):
        losses.append("factors in float64")
    return losses


def _fold(parts: Sequence[Factors]) -> tuple[float, dict[str, float]]:
    """Return the alpha for all, and target → power of two that b must take up.

    Of the alphas the parts have, and 0 for a scaling of 1, the one that leaves most
    targets untouched; targets that no power of two brings there are left out.
    """
    alphas = {factors.float32_alpha(part) for part in parts}
    choices = [0.0, *sorted(alpha for alpha in alphas if alpha)]
    found = []
    for alpha in choices:
        ratios = {}
        for part in parts:
            reached = alpha / part.rank if alpha else 1.0
            ratio = part.scaling / reached
            if abs(math.frexp(ratio)[0]) == 0.5 and ratio * reached == part.scaling:
                ratios[part.target] = ratio
        untouched = sum(ratio == 1 for ratio in ratios.values())
        found.append((len(ratios), untouched, alpha, ratios))
    _, _, alpha, ratios = max(found, key=lambda choice: choice[:3])
    return alpha, ratios


def _times(b: Matrix, ratio: float) -> Matrix | None:
    """Return b times a power of two, None where a number would leave its dtype's range."""
    import numpy as np

    values = arrays.floats(b.data, b.dtype, b.shape).astype("f8")
    wanted = values * ratio
    with np.errstate(over="ignore"):
        narrow = wanted.astype("<f2" if b.dtype == "F16" else "<f4")
    if b.dtype == "BF16":
        whole = narrow.view("<u4")
        if (whole & 0xFFFF).any():
            return None
        data = (whole >> 16).astype("<u2").tobytes()
    else:
        data = narrow.tobytes()
    is_same = np.array_equal(narrow.astype("f8"), wanted, equal_nan=True)
    return replace(b, data=data) if is_same else None


# ── the file ─────────────────────────────────────────────────────────────────────────


def _contents(
    library: ModuleType, data: bytes, where: str
) -> tuple[dict[str, Any], dict[str, Matrix]]:
    """Return the file's fields and its tensors; nothing of it stays mapped."""
    named = {
        library.GGMLQuantizationType.F32: "F32",
        library.GGMLQuantizationType.F16: "F16",
        library.GGMLQuantizationType.BF16: "BF16",
    }
    tensors = {}
    with tempfile.TemporaryDirectory() as folder:
        # The package reads files only, and maps them: so it is given a copy of its own.
        path = Path(folder) / WEIGHTS_NAME
        path.write_bytes(data)
        try:
            reader = library.GGUFReader(path)
            fields = {name: field.contents() for name, field in reader.fields.items()}
            for tensor in reader.tensors:
                dtype = named.get(tensor.tensor_type)
                if dtype is None:
                    raise FormatError(
                        f"{tensor.name} is {tensor.tensor_type.name}; expected one of "
                        f"{', '.join(_DTYPES)}",
                        where=where,
                        hint="quantised factors have lost what they were",
                    )
                # GGUF counts the axes from the other end.
                shape = tuple(int(size) for size in reversed(tensor.shape.tolist()))
                tensors[tensor.name] = Matrix(dtype, shape, tensor.data.tobytes())
        except (ValueError, LookupError, TypeError, ArithmeticError) as error:
            raise FormatError(
                f"is no GGUF file that can be read: {error}", where=where
            ) from error
    return fields, tensors


def _encode(
    library: ModuleType, architecture: str, alpha: float, tensors: Mapping[str, Matrix]
) -> bytes:
    import numpy as np

    writer = library.GGUFWriter(None, architecture)
    writer.add_type(library.GGUFType.ADAPTER)
    writer.add_string(library.Keys.Adapter.TYPE, "lora")
    writer.add_float32(library.Keys.Adapter.LORA_ALPHA, alpha)
    for name in sorted(tensors):
        whole = tensors[name]
        rows, columns = whole.shape
        # As bytes, with the dtype beside them: numpy has no bfloat16.
        flat = np.frombuffer(whole.data, dtype="u1").reshape(rows, -1)
        assert flat.shape[1] == columns * BITS[whole.dtype] // 8
        writer.add_tensor(name, flat, raw_dtype=library.GGMLQuantizationType[whole.dtype])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / WEIGHTS_NAME
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


def _alpha(value: Any, where: str) -> float:
    if not isinstance(value, float) or not math.isfinite(value):
        raise FormatError(f"alpha is {value!r}, expected a finite number", where=where)
    return value
