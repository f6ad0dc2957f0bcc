"""Which parameter of a module the factors of PEFT's `target_parameters` belong to.

PEFT wraps a module once for each of its targeted parameters, in the order in which the
module defines them: the factors of the first lie deepest (`….experts.base_layer.lora_A`),
those of the last outside (`….experts.lora_A`). The file says no more, so the order must be
known: where one parameter is meant there is no question, and for several it is looked up
in a table. A combination that is not in the table is refused.

Source: PEFT 0.21.2, `tuners/tuners_utils.py:_inject_parameters`; transformers 5.23.0, the
order of `nn.Parameter` in all modules with several parameters of two or three axes.
"""

from collections.abc import Collection, Mapping
from typing import Any

from lora_hub.errors import FormatError
from lora_hub.formats.patterns import Budget
from lora_hub.formats.peft_targets import check_parameters, module_matcher, parameters_of
from lora_hub.formats.peft_tensors import WRAPPED, Named

# Parameters of one module in the order in which it defines them.
_ORDERS = (
    ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"),
    ("gate_proj", "up_proj", "down_proj"),
    ("w1", "v1", "w2"),  # DBRX, whose experts lie in one matrix
)


def in_order(parameters: Collection[str]) -> tuple[str, ...] | None:
    """Return a module's parameters as it defines them, None where that is not known."""
    if len(parameters) == 1:
        return tuple(parameters)
    for order in _ORDERS:
        if set(parameters) <= set(order):
            return tuple(name for name in order if name in parameters)
    return None


def find_parameters(
    config: Mapping[str, Any],
    named: Named,
    where: str,
    config_where: str,
    budget: Budget | None = None,
) -> dict[tuple[str, int], str]:
    """Return (path of the module, depth) → its parameter, for modules that have one.

    Raises:
        FormatError: the names of the tensors and target_parameters disagree, or the order
            of a module's parameters is not known.
    """
    if not config.get("target_parameters") and not any(depth for _, depth in named.updates):
        return {}
    depths: dict[str, list[int]] = {}
    for module, depth in named.updates:
        depths.setdefault(module, []).append(depth)
    is_listed = module_matcher(config, config_where, budget)
    parameters_at = parameters_of(config)
    found: dict[tuple[str, int], str] = {}
    for module, held in sorted(depths.items()):
        key = named.keys[module]
        sure, bare = parameters_at(key)
        if held == [0] and named.updates[module, 0].is_embedding:
            continue
        # PEFT takes the parameters of no module that it has taken already.
        if held == [0] and not sure and (not bare or is_listed(key)):
            continue
        parameters = sure if len(held) == len(sure) else sure | bare
        is_embedding = any(named.updates[module, each].is_embedding for each in held)
        if is_embedding or sorted(held) != list(range(len(parameters))):
            names = ", ".join(sorted(parameters)) or "none"
            raise FormatError(
                f"{module}: the weights hold factors of {len(held)} of its parameters, and "
                f"target_parameters may mean {names}",
                where=where,
                hint="name the parameters in target_parameters with their modules",
            )
        order = in_order(parameters)
        if order is None:
            raise FormatError(
                f"{module}: target_parameters names {', '.join(sorted(parameters))}, and "
                "which of them comes first is not known, so neither is whose factors are "
                "which",
                where=config_where,
                hint="save one adapter for each parameter, and compose them",
            )
        for depth, parameter in enumerate(reversed(order)):
            found[module, depth] = parameter
    paths = {f"{named.keys[module]}.{name}" for (module, _), name in found.items()}
    check_parameters(config, paths, config_where)
    return found


def wrapped_paths(targets: Collection[str]) -> dict[str, str] | None:
    """Return path of a parameter → path under which PEFT keeps its factors.

    None where the order of a module's parameters is not known.
    """
    by_module: dict[str, list[str]] = {}
    for target in targets:
        module, _, parameter = target.rpartition(".")
        by_module.setdefault(module, []).append(parameter)
    paths: dict[str, str] = {}
    for module, parameters in by_module.items():
        order = in_order(parameters)
        if order is None:
            return None
        for depth, parameter in enumerate(reversed(order)):
            paths[f"{module}.{parameter}"] = module + depth * WRAPPED
    return paths
