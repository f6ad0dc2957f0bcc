"""LoHa of PEFT: two low-rank matrices multiplied number by number, as one of rank r².

    Δ = scaling * (w1_a @ w1_b) * (w2_a @ w2_b)

A convolution's kernel lies flat among the inputs, and no file of LoHa says its axes: the
base does. Without a base such a target is read as a linear layer of in · kernel inputs.

Sources: Hyeon-Woo et al. 2022, arXiv:2108.06098; PEFT 0.21.2, `tuners/loha/layer.py`.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_hub.formats.base_names import modules_of, shape_at
from lora_hub.formats.computed import Computed, source_of
from lora_hub.formats.peft_methods import Held, Method, check_patterns, open_method
from lora_hub.formats.peft_targets import expand
from lora_hub.formats.products import check_size, khatri_rao
from lora_hub.formats.source import AdapterSource
from lora_hub.tensors.file import TensorFile

_NAMES = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_TUCKER = ("hada_t1", "hada_t2")

# Keys that matter while training, and here no more.
TRAINING = frozenset({"init_weights", "module_dropout", "rank_dropout"})


def read_loha(
    config: Mapping[str, Any], tensors: TensorFile, where: str, base: Path | None = None
) -> AdapterSource:
    """Return the adapter in PEFT's files; see `peft_types.Reader`.

    Raises:
        FormatError: config and tensors disagree, or disagree with the base, a convolution
            is decomposed by Tucker, or r² is above what the layer's shape can hold.
        InputError: the base cannot be read.
    """
    method = open_method(
        config,
        tensors,
        where,
        names=_NAMES + _TUCKER,
        read={"alpha", "alpha_pattern", "r", "rank_pattern"},
        inert={*TRAINING, "use_effective_conv2d"},
    )
    ranks, alphas = rank_and_alpha(method)
    check_size([_shape(method, held, ranks[held.key]) for held in method.held], where)
    modules = {} if base is None else modules_of(base)
    return source_of(
        method,
        [
            _computed(
                method,
                held,
                alphas[held.key] / ranks[held.key],
                shape_at(modules, held.target)[1:],
            )
            for held in method.held
        ],
    )


def rank_and_alpha(method: Method) -> tuple[dict[str, int], dict[str, float]]:
    """Return key → rank and key → alpha, patterns expanded as PEFT does."""
    check_patterns(method.config, method.config_where)
    found = (method.keys, method.config_where, method.budget)
    return (
        expand(method.config, "rank_pattern", "r", 8, *found),
        expand(method.config, "alpha_pattern", "alpha", 8, *found),
    )


def _shape(method: Method, held: Held, rank: int) -> tuple[int, int, int]:
    """Return out, in and the product's rank, after a look at every shape."""
    if any(name in held.tensors for name in _TUCKER):
        method.refuse(
            held,
            "the kernel is decomposed by Tucker (hada_t1, hada_t2), whose product is no "
            "pair of factors",
            hint="train it with use_effective_conv2d false, or merge it with PEFT",
        )
    missing = [name for name in _NAMES if name not in held.tensors]
    if missing:
        method.refuse(held, f"there is no {missing[0]} beside its other factors")
    shapes = {name: held.tensors[name].shape for name in _NAMES}
    out, inp = shapes["hada_w1_a"][0], shapes["hada_w1_b"][-1]
    expected = [(out, rank), (rank, inp)] * 2
    if list(shapes.values()) != expected or 0 in (out, inp):
        method.refuse(
            held,
            f"the factors are {', '.join(str(list(shape)) for shape in shapes.values())}; "
            f"expected {', '.join(str(list(shape)) for shape in expected)}",
        )
    if rank * rank > min(out, inp):
        method.refuse(
            held,
            f"as one pair of factors LoHa of rank {rank} has rank {rank * rank}, above the "
            f"{min(out, inp)} that {out} outputs and {inp} inputs can have",
            hint="PEFT's convert_to_lora gives the nearest LoRA of a lower rank",
        )
    return out, inp, rank * rank


def _computed(
    method: Method, held: Held, scaling: float, inputs: tuple[int, ...]
) -> Computed:
    """Return the factors; `inputs` is what follows the outputs in the base's weight."""
    b1, a1, b2, a2 = (method.array(held.tensors[name]) for name in _NAMES)
    a, b = khatri_rao(a1, b1, a2, b2)
    if len(inputs) < 2:
        return Computed(held.target, a, b, scaling)
    if math.prod(inputs) != a.shape[1]:
        method.refuse(
            held,
            f"has {a.shape[1]} inputs with the kernel, the base {math.prod(inputs)}",
            hint="give the base the adapter was trained on",
        )
    b = b.reshape(*b.shape, *(1 for _ in inputs[1:]))
    return Computed(held.target, a.reshape(-1, *inputs), b, scaling, "conv")
