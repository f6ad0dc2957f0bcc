"""VeRA and PVeRA of PEFT: two shared random matrices, scaled for each module.

    Δ = (λ_b ⊙ B[:out]) @ (λ_d ⊙ A[:, :in])        λ scale rows

A and B are as large as the largest module and shared by all. They are read from the file
where `save_projection` put them there; drawn anew from a seed they would be another
machine's numbers. PVeRA's A and λ_d hold a mean and a variance one behind the other; with
`sample_at_inference` false, as by default, only the mean acts.

Sources: Kopiczko et al. 2024, arXiv:2310.11454; PEFT 0.21.2, `tuners/vera/layer.py`,
`tuners/pvera/layer.py`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_hub.errors import FormatError
from lora_hub.formats.base_names import modules_of, shape_at
from lora_hub.formats.computed import Computed, source_of
from lora_hub.formats.peft_methods import (
    Held,
    Method,
    open_method,
    whole_number,
)
from lora_hub.formats.peft_tensors import WEIGHTS_NAME
from lora_hub.formats.products import check_size
from lora_hub.formats.source import AdapterSource
from lora_hub.tensors.file import TensorFile
from lora_hub.tensors.header import TensorInfo


def read_vera(
    config: Mapping[str, Any], tensors: TensorFile, where: str, base: Path | None = None
) -> AdapterSource:
    """Return the adapter in PEFT's files; see `peft_types.Reader`.

    How many of A's columns a module takes, no file of the adapter says. All of them,
    where the modules have one name in common; else the base tells.

    Raises:
        FormatError: the projections are not in the file, config and tensors disagree, or
            the base is needed and not given.
        InputError: the base cannot be read.
    """
    kind = str(config["peft_type"]).lower()
    projections = f"base_model.{kind}_A", f"base_model.{kind}_B"
    method = open_method(
        config,
        tensors,
        where,
        names={f"{kind}_lambda_b", f"{kind}_lambda_d"},
        read={"r", "sample_at_inference"},
        inert={
            "d_initial",
            "generator_seed",
            "init_weights",
            "projection_prng_key",
            "save_projection",
            f"{kind}_dropout",
        },
        apart=projections,
    )
    if config.get("sample_at_inference"):
        raise FormatError(
            "sample_at_inference is true: the change is drawn anew for every input",
            where=method.config_where,
            hint="with sample_at_inference false the mean is applied, and can be read",
        )
    rank = whole_number(config, "r", 256, method.config_where)
    parts = 2 if kind == "pvera" else 1
    big_a, big_b = _projections(method, projections, rank, parts)
    inputs = _inputs(method, big_a.shape[1], base)
    outputs = {held.target: _out(method, held, kind, rank * parts) for held in method.held}
    for held in method.held:
        out, inp = outputs[held.target], inputs[held.target]
        if out > big_b.shape[0] or inp > big_a.shape[1]:
            method.refuse(
                held,
                f"has {out} outputs and {inp} inputs, the projections are made for "
                f"{big_b.shape[0]} and {big_a.shape[1]}",
            )
    check_size([(outputs[key], inputs[key], rank) for key in outputs], where)
    whole_a, whole_b = method.array(big_a), method.array(big_b)
    computed = []
    for held in method.held:
        lambda_b = method.array(held.tensors[f"{kind}_lambda_b"]).astype("float64")
        lambda_d = method.array(held.tensors[f"{kind}_lambda_d"]).astype("float64")
        computed.append(
            Computed(
                held.target,
                a=lambda_d[:rank, None] * whole_a[:rank, : inputs[held.target]],
                b=lambda_b[:, None] * whole_b[: outputs[held.target]],
                scaling=1.0,
            )
        )
    return source_of(method, computed)


def _projections(
    method: Method, names: tuple[str, str], rank: int, parts: int
) -> tuple[TensorInfo, TensorInfo]:
    held = method.tensors.header.tensors
    where = f"{method.where}/{WEIGHTS_NAME}"
    if any(name not in held for name in names):
        raise FormatError(
            f"the projections ({', '.join(names)}) are not in the file: they were to be "
            "drawn anew from a seed, which gives other numbers on other machines",
            where=where,
            hint="load it in PEFT where it was trained, set save_projection to true in "
            "its config before the model is made, and save it again",
        )
    big_a, big_b = held[names[0]], held[names[1]]
    shapes = f"the projections are {list(big_a.shape)} and {list(big_b.shape)}"
    if (
        len(big_a.shape) != 2
        or len(big_b.shape) != 2
        or (big_a.shape[0], big_b.shape[1]) != (rank * parts, rank)
    ):
        raise FormatError(
            f"{shapes}; expected [{rank * parts}, in] and [out, {rank}]", where=where
        )
    return big_a, big_b


def _out(method: Method, held: Held, kind: str, rank: int) -> int:
    names = (f"{kind}_lambda_b", f"{kind}_lambda_d")
    missing = [name for name in names if name not in held.tensors]
    if missing:
        method.refuse(held, f"there is no {missing[0]} beside its other vector")
    lambda_b, lambda_d = (held.tensors[name].shape for name in names)
    if len(lambda_b) != 1 or lambda_d != (rank,) or 0 in lambda_b:
        method.refuse(
            held,
            f"the vectors are {list(lambda_b)} and {list(lambda_d)}; expected [out] and "
            f"[{rank}]",
        )
    return lambda_b[0]


def _inputs(method: Method, most: int, base: Path | None) -> dict[str, int]:
    """Return target → how many inputs it has."""
    if base is None:
        last_parts = {held.target.rpartition(".")[2] for held in method.held}
        if len(last_parts) > 1:
            raise FormatError(
                f"how many inputs {', '.join(sorted(last_parts))} have, no file of VeRA "
                "says: they share one projection as large as the largest",
                where=method.where,
                hint="name the base with --base: its shapes tell",
            )
        return {held.target: most for held in method.held}
    modules = modules_of(base)
    found = {}
    for held in method.held:
        shape = shape_at(modules, held.target)
        kind = str(method.config["peft_type"]).lower()
        lambda_b = held.tensors.get(f"{kind}_lambda_b")
        out = lambda_b.shape[0] if lambda_b and lambda_b.shape else -1
        if len(shape) != 2 or out not in shape:
            method.refuse(
                held,
                f"has {out} outputs; in the base its weight is "
                f"{list(shape) if shape else 'missing'}",
            )
        # (out, in), or (in, out) as transformers' Conv1D keeps it.
        found[held.target] = shape[1] if shape[0] == out else shape[0]
    return found
