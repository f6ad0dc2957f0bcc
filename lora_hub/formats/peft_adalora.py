"""AdaLoRA of PEFT: factors with a trained diagonal between them.

    Δ = alpha / (init_r + 1e-5) * B @ (E ⊙ A)        E scales rows

The ranks that training gave up are not in the file, or have a zero in E. The divisor stays
the first rank, with PEFT's 1e-5 that keeps it from zero.

Sources: Zhang et al. 2023, arXiv:2303.10512; PEFT 0.21.2, `tuners/adalora/layer.py`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_hub.errors import FormatError
from lora_hub.formats.computed import Computed, source_of
from lora_hub.formats.peft_methods import Held, Method, number, open_method, whole_number
from lora_hub.formats.products import check_size
from lora_hub.formats.source import AdapterSource
from lora_hub.tensors.file import TensorFile

_NAMES = ("lora_A", "lora_B", "lora_E")

# Keys of LoRA that AdaLoRA leaves unread, and its own plan of training.
_INERT = frozenset(
    {
        "alpha_pattern",
        "beta1",
        "beta2",
        "corda_config",
        "deltaT",
        "eva_config",
        "init_lora_weights",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "orth_reg_weight",
        "qalora_group_size",
        "r",
        "target_r",
        "tfinal",
        "tinit",
        "total_step",
        "use_rslora",
        "velora_config",
    }
)


def read_adalora(
    config: Mapping[str, Any], tensors: TensorFile, where: str, base: Path | None = None
) -> AdapterSource:
    """Return the adapter in PEFT's files; see `peft_types.Reader`.

    Raises:
        FormatError: config and tensors disagree, or hold something else.
    """
    method = open_method(
        config,
        tensors,
        where,
        names=_NAMES,
        read={"init_r", "lora_alpha", "rank_pattern"},
        inert=_INERT,
    )
    first = whole_number(config, "init_r", 12, method.config_where)
    alpha = number(config, "lora_alpha", 8, method.config_where)
    if alpha <= 0:
        raise FormatError(
            f"lora_alpha is {alpha:g}: AdaLoRA would take a rank in its place, of which "
            "it has several",
            where=method.config_where,
        )
    ranks = _ranks(method, first)
    shapes = [_shape(method, held, ranks.get(held.key, first)) for held in method.held]
    check_size(shapes, where)
    computed = []
    for held, (_, _, rank) in zip(method.held, shapes, strict=True):
        if rank == 0:
            continue  # training gave this module up: nothing of it changes
        a, b, diagonal = (
            method.array(held.tensors[name]).astype("float64") for name in _NAMES
        )
        scaling = alpha / (first + 1e-5)
        computed.append(Computed(held.target, diagonal.reshape(-1, 1) * a, b, scaling))
    if not computed:
        raise FormatError("every module's rank is 0: nothing changes", where=where)
    return source_of(method, computed)


def _ranks(method: Method, first: int) -> dict[str, int]:
    """Return key → rank as `rank_pattern` tells it: names of lora_E, a mask each."""
    where = f"{method.config_where}#/rank_pattern"
    masks = method.config.get("rank_pattern") or {}
    if not isinstance(masks, dict):
        raise FormatError("expected an object of names and lists", where=where)
    ranks = {}
    for name, mask in masks.items():
        key = name.removesuffix(".default").removesuffix(".lora_E")
        is_mask = isinstance(mask, list) and all(type(item) is bool for item in mask)
        if not is_mask or len(mask) != first or key not in method.keys:
            raise FormatError(
                f"{name!r} is no module of the weights with a list of {first} true and "
                "false",
                where=where,
            )
        ranks[key] = sum(mask)
    return ranks


def _shape(method: Method, held: Held, rank: int) -> tuple[int, int, int]:
    missing = [name for name in _NAMES if name not in held.tensors]
    if missing:
        method.refuse(held, f"there is no {missing[0]} beside its other factors")
    a, b, diagonal = (held.tensors[name].shape for name in _NAMES)
    if (
        len(a) != 2
        or len(b) != 2
        or (a[0], b[1], diagonal) != (rank, rank, (rank, 1))
        or 0 in (a[1], b[0])
    ):
        method.refuse(
            held,
            f"lora_A, lora_B and lora_E are {list(a)}, {list(b)} and {list(diagonal)}; "
            f"expected [{rank}, in], [out, {rank}] and [{rank}, 1]",
        )
    return b[0], a[1], rank
