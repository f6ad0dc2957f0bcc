"""llama.cpp's LoRA in a GGUF file, through the `gguf` package, both ways.

Tensors have llama.cpp's names (`blk.0.attn_q.weight.lora_a`), which the base's
architecture gives them, so both ways need the base (`gguf_base.py`). llama.cpp keeps the
rows of q and k of some models in another order, which the rows of b follow. Of an
embedding `lora_a` is (tokens, rank), of experts there is one more axis in front, and gate
and up are two tensors. One alpha stands for all; the scaling is alpha/rank, and 1 where
alpha is 0.

Where no one alpha is right for all, b takes up the ratio if that is a power of two, which
moves exponents and rounds nothing. Any other adapter is refused.

Source: ggml-org/llama.cpp 0b03ada, `convert_lora_to_gguf.py`; `src/llama-adapter.cpp` for
the scaling; for embeddings and experts `src/llama-graph.cpp` (`build_inp_embd`,
`build_lora_mm_id`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from lora_hub import extras
from lora_hub.errors import FormatError
from lora_hub.formats import factors, fold, gguf_base, gguf_file, layers, losses
from lora_hub.formats.dialect import Given, Glance, ReadOptions, Written
from lora_hub.formats.factors import Factors
from lora_hub.formats.gguf_base import Base
from lora_hub.formats.gguf_bounds import check_bounds
from lora_hub.formats.matrices import (
    Matrix,
    block_diagonal,
    join_experts,
    parted,
    split_experts,
    stacked,
    zeros,
)
from lora_hub.formats.source import AdapterSource

WEIGHTS_NAME = "adapter.gguf"
MAGIC = b"GGUF"
SAYS = frozenset({"embeddings", "experts", "language", "ranks"})

_EMBEDDING = "token_embd"

# A factor a and a factor b.
_Pair = tuple[Matrix, Matrix]


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
    fields, tensors = gguf_file.contents(library, given.weights, where)
    kinds = fields.get("general.type"), fields.get(library.Keys.Adapter.TYPE)
    if kinds != ("adapter", "lora"):
        # Files from before there was a general.type hold models.
        kind = kinds[0] or "model"
        said = f"an adapter of type {kinds[1]!r}" if kind == "adapter" else f"a {kind}"
        raise FormatError(
            f"is a GGUF of {said}, expected one of a LoRA adapter",
            where=where,
            hint="llama.cpp's convert_lora_to_gguf.py writes such; a base is given as a "
            "folder of safetensors",
        )
    if fields.get(library.Keys.Adapter.ALORA_INVOCATION_TOKENS):
        raise FormatError("acts only behind an invocation text (aLoRA)", where=where)
    alpha = _alpha(fields.get(library.Keys.Adapter.LORA_ALPHA, 0.0), where)
    if options.base is None:
        raise FormatError(
            "names of llama.cpp are others than the base's, and its q and k have another "
            "order of rows: both need the base",
            where=where,
            hint="give the folder of the base with --base",
        )
    base = gguf_base.describe(library, options.base)
    stated = fields.get("general.architecture")
    if stated != base.architecture:
        raise FormatError(
            f"is for the architecture {stated!r}, the base is {base.architecture!r}",
            where=where,
        )
    parts = _parts(_halves(tensors, where), base, where)
    if not parts:
        raise FormatError("the file holds no factors", where=where)
    # 0 means that nothing but the user's own factor scales.
    scaled = [
        replace(part, alpha=part.alpha * alpha if alpha else float(part.rank))
        for part in parts
    ]
    return factors.to_source(scaled, where=where)


def write(source: AdapterSource, base: Path | None = None) -> Written:
    """Return the file that `llama-cli --lora` takes.

    Raises:
        FormatError: no base was given, or its architecture is not known here.
        LossyConversion: a target has no name in llama.cpp, factors are float64, no alpha
            and no powers of two say the scalings, or the adapter holds what is no update
            of a linear layer, an embedding or experts.
        MissingExtra: the `gguf` package is not installed.
    """
    if base is None:
        raise FormatError(
            "llama.cpp's names and its order of rows depend on the base",
            hint="give the folder of the base with --base",
        )
    library = extras.require("gguf", extra="demo")
    known = gguf_base.describe(library, base)
    parts = factors.of_source(source)
    found = losses.beyond(source, SAYS) + _unsaid(parts, known)
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
        found.append(
            "one alpha for all targets, and no power of two times it is the scaling of "
            f"{factors.some(inexact)}"
        )
    factors.refuse(found, "llama.cpp")
    tensors: dict[str, Matrix] = {}
    for part in folded.values():
        for name, (a, b) in _named(part, known).items():
            tensors |= {f"{name}.weight.lora_a": a, f"{name}.weight.lora_b": b}
    moved = [part.target for part in parts if ratios[part.target] != 1]
    note = f"a power of two of the scaling moved into b of {factors.some(moved)}"
    data = gguf_file.encode(library, known.architecture, alpha, tensors)
    return Written({WEIGHTS_NAME: (data,)}, (note,) if moved else ())


# ── layers ───────────────────────────────────────────────────────────────────────────


def _named(part: Factors, base: Base) -> dict[str, _Pair]:
    """Return llama.cpp's names for a target, and its factors as they are kept there."""
    if part.layer == "experts":
        a, b = split_experts(part.a, part.b, part.experts)
        names = gguf_base.expert_parts(part.target, base)
        cuts = parted(b, len(names))
        return {name: (a, cut) for name, cut in zip(names, cuts, strict=True)}
    name = base.names[part.target]
    if part.layer == "embedding":
        return {name: (part.a.transposed(), part.b)}
    heads = base.heads.get(part.target.rpartition(".")[2])
    b = gguf_base.reordered(part.b, heads, part.target, back=False) if heads else part.b
    return {name: (part.a, b)}


def _parts(pairs: Mapping[str, _Pair], base: Base, where: str) -> list[Factors]:
    """Return the targets' factors; an alpha of n says n times that of the file.

    (The factors of two kinds of experts stacked have twice the rank, and one scaling.)
    """
    modules = {name: module for module, name in base.names.items()}
    experts = gguf_base.experts_of(base)
    parts = []
    halves: dict[str, dict[int, _Pair]] = {}
    for name, (a, b) in pairs.items():
        module = modules.get(name)
        if name in experts:
            target, number = experts[name]
            _check_experts(name, a, b, where)
            halves.setdefault(target, {})[number] = (a, b)
            continue
        if module is None:
            raise FormatError(
                f"the tensor {name!r} is no factor of a layer of the base that is known",
                where=where,
            )
        if name == _EMBEDDING and len(a.shape) == 2:
            part = Factors(module, 1.0, "alpha/r", a.transposed(), b, layer="embedding")
            layers.check_factors(part, where)
        else:
            part = Factors(module, 1.0, "alpha/r", a, b)
            layers.check_factors(part, where)
            heads = base.heads.get(module.rpartition(".")[2])
            if heads:
                part = replace(part, b=gguf_base.reordered(b, heads, module, back=True))
        parts.append(part)
    for target, held in halves.items():
        count = len(gguf_base.expert_parts(target, base))
        parts.append(_joined(target, held, count, where))
        layers.check_factors(parts[-1], where)
    return parts


def _check_experts(name: str, a: Matrix, b: Matrix, where: str) -> None:
    shapes = f"the factors are {list(a.shape)} and {list(b.shape)}"
    if (
        not len(a.shape) == len(b.shape) == 3
        or (a.shape[0], a.shape[1]) != (b.shape[0], b.shape[2])
        or a.dtype != b.dtype
        or 0 in a.shape + b.shape
    ):
        raise FormatError(
            f"{name}: {shapes}; expected [experts, rank, in] and [experts, out, rank]",
            where=where,
        )


def _joined(target: str, held: Mapping[int, _Pair], count: int, where: str) -> Factors:
    """Return the update of a whole parameter of experts, of which parts are given."""
    first_a, first_b = next(iter(held.values()))
    for a, b in held.values():
        if a.shape != first_a.shape or b.shape != first_b.shape or a.dtype != first_a.dtype:
            raise FormatError(
                f"{target}: its parts have factors of unlike shapes or dtypes, which one "
                "alpha and one rank do not say",
                where=where,
            )
    empty = zeros(first_b.dtype, first_b.shape)
    if all(bytes(a.data) == bytes(first_a.data) for a, _ in held.values()):
        a, times = first_a, 1
        b = stacked([held[n][1] if n in held else empty for n in range(count)], axis=1)
    else:
        times = count
        a = stacked([held[n][0] for n in range(count)], axis=1)
        b = block_diagonal([held[n][1] for n in range(count)])
    experts = a.shape[0]
    whole_a, whole_b = join_experts(a, b)
    return Factors(
        target, float(times), "alpha/r", whole_a, whole_b, layer="experts", experts=experts
    )


def _halves(tensors: Mapping[str, Matrix], where: str) -> dict[str, _Pair]:
    """Return llama.cpp's name of a weight → its two factors."""
    halves: dict[str, dict[str, Matrix]] = {}
    for name, whole in tensors.items():
        stem, _, which = name.rpartition(".lora_")
        if which not in ("a", "b") or not stem.endswith(".weight"):
            raise FormatError(f"the tensor {name!r} is no low-rank factor", where=where)
        halves.setdefault(stem.removesuffix(".weight"), {})[which] = whole
    for name, half in halves.items():
        if len(half) != 2:
            raise FormatError(f"{name} has one factor and not the other", where=where)
    return {name: (half["a"], half["b"]) for name, half in halves.items()}


# ── scalings ─────────────────────────────────────────────────────────────────────────


def _unsaid(parts: Sequence[Factors], base: Base) -> list[str]:
    found = []
    unnamed = [part.target for part in parts if not _has_name(part, base)]
    if unnamed:
        found.append(f"{factors.some(unnamed)} is no layer of the base that it names")
    tied = [p.target for p in parts if p.target == "lm_head" or p.layer == "embedding"]
    if base.is_tied and tied:
        found.append(
            f"the output layer of the base is its embedding, of which it keeps one tensor "
            f"(lm_head is tied): {factors.some(tied)}"
        )
    if any(part.a.dtype not in gguf_file.DTYPES for part in parts):
        found.append("factors in float64")
    return found


def _has_name(part: Factors, base: Base) -> bool:
    if part.layer == "experts":
        names = gguf_base.expert_parts(part.target, base)
        return bool(names) and part.b.shape[0] % len(names) == 0
    name = base.names.get(part.target)
    return name is not None and (name == _EMBEDDING) == (part.layer == "embedding")


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
    found = fold.times(b, Fraction(ratio))
    return found[0] if found and not found[1] else None


def _alpha(value: Any, where: str) -> float:
    if not isinstance(value, float) or not math.isfinite(value):
        raise FormatError(f"alpha is {value!r}, expected a finite number", where=where)
    return value
