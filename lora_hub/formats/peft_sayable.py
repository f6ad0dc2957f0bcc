"""What of an adapter PEFT's LoRA cannot say, each by name.

It has one rule of scaling, DoRA and lora_bias for all targets or none, and no place for
factors on outputs and inputs. What PEFT refuses to load is no way of saying it.

Source: PEFT 0.21.2, `tuners/lora/layer.py`; the rules of modules_to_save are in
`peft_targets.py`.
"""

import re
from collections.abc import Iterable

from lora_hub.embeddings import VOCABULARY, last_part
from lora_hub.errors import LossyConversion
from lora_hub.formats.peft_experts import wrapped_paths
from lora_hub.formats.peft_targets import HEADS, excluded_by
from lora_hub.formats.peft_ties import TIED_NAMES
from lora_hub.formats.source import AdapterSource, Replacement
from lora_hub.scaling import alpha_of, scaling


def check_sayable(source: AdapterSource) -> None:
    """Raise `LossyConversion` unless PEFT's LoRA can say the whole source."""
    losses = losses_of(source)
    if losses:
        raise LossyConversion(
            f"PEFT's LoRA cannot say this adapter exactly: {'; '.join(losses)}",
            losses=tuple(losses),
            hint="merge it into its base instead",
        )


def losses_of(source: AdapterSource) -> list[str]:
    """Return what PEFT's LoRA cannot say of a source, in words."""
    return [loss for check in _CHECKS for loss in check(source)]


def saved_modules(replacements: Iterable[Replacement], task_type: str | None) -> list[str]:
    """Return what modules_to_save must list, so that PEFT takes the whole weights.

    Modules by their paths, none within another; those that PEFT adds by itself for a task
    by the name under which it does.
    """
    owners = {
        each.name.rpartition(".")[0]
        for each in replacements
        if each.rows is None and each.role == "modules_to_save"
    }
    heads = HEADS.get(task_type, ())
    found = set()
    for owner in sorted(owners):
        paths = [owner[:end] for end in range(len(owner)) if owner[end] == "."] + [owner]
        named = [head for head in heads if any(path.endswith(head) for path in paths)]
        found |= set(named) or {next(path for path in paths if path in owners)}
    return sorted(found)


def _without_updates(source: AdapterSource) -> Iterable[str]:
    if not source.updates:
        yield "an adapter without one update of low rank"


def _scales(source: AdapterSource) -> Iterable[str]:
    if source.scales:
        yield f"factors on outputs or inputs (IA3), as of {source.scales[0].target}"


def _partly(source: AdapterSource) -> Iterable[str]:
    for what, held in (
        ("DoRA", [update.magnitude is not None for update in source.updates]),
        ("a bias beside the factors", [u.bias is not None for u in source.updates]),
    ):
        if any(held) and not all(held):
            without = source.updates[held.index(False)].target
            yield f"{what} for some targets and not for {without}"
    if any(u.magnitude is not None and u.bias is not None for u in source.updates):
        yield "DoRA and a bias beside the factors together"


def _unlike_layers(source: AdapterSource) -> Iterable[str]:
    ties = source.ties_weights
    for update in source.updates:
        layer, target = update.layer, update.target
        is_grouped = layer == "conv" and update.b.shape[1] != update.rank
        if update.magnitude is not None and (layer == "experts" or is_grouped):
            kind = "a convolution in groups" if is_grouped else "experts"
            yield f"DoRA of {kind}, {target}"
        if update.magnitude is not None and layer == "embedding" and ties:
            yield f"DoRA of tied embeddings, {target}"
        if update.bias is not None and layer in ("embedding", "experts"):
            yield f"a bias beside the factors of {layer}, {target}"
        if source.alora_tokens and (layer != "linear" or update.magnitude is not None):
            what = "DoRA" if layer == "linear" else layer
            yield f"invocation tokens (aLoRA) with {what}, {target}"


def _unlike_rules(source: AdapterSource) -> Iterable[str]:
    if len({update.rule for update in source.updates}) > 1:
        for update in source.updates:
            alpha = alpha_of(update.scaling, update.rank, "alpha/r")
            if scaling(alpha, update.rank, "alpha/r") != update.scaling:
                yield f"two rules of scaling, as of {update.target}"


def _parameters(source: AdapterSource) -> Iterable[str]:
    parameters = [u.target for u in source.updates if u.layer == "experts"]
    if wrapped_paths(parameters) is None:
        yield "several parameters of one module whose order is not known"
    modules = {target.rpartition(".")[0] for target in parameters}
    both = sorted(modules & {u.target for u in source.updates})
    if both:
        yield f"an update of a module and one of its parameters, {both[0]}"


def _ties(source: AdapterSource) -> Iterable[str]:
    held = [u.target for u in source.updates if u.layer == "embedding"]
    held += [
        each.name.removesuffix(".weight")
        for each in source.replacements
        if each.rows is None and each.role == "modules_to_save"
    ]
    names = [name for name in held if last_part(name) in VOCABULARY]
    if source.ties_weights and names and not any(last_part(n) in TIED_NAMES for n in names):
        yield f"a change of {names[0]} that is the tied head's too, which PEFT does not tie"


def _saved(source: AdapterSource) -> Iterable[str]:
    targets = {u.target for u in source.updates if u.layer != "experts"}
    saved = saved_modules(source.replacements, source.task_type)
    names = [*saved, *HEADS.get(source.task_type, ())]
    excluded = excluded_by([re.escape(name) for name in names], sorted(targets))
    if excluded:
        yield f"an update of {excluded} within a module that is saved whole"
    for each in source.replacements:
        module = each.name.removesuffix(".weight")
        if each.rows is not None and (module in targets or module == each.name):
            yield f"rows of {each.name} beside its own update"


_CHECKS = (
    _without_updates,
    _scales,
    _partly,
    _unlike_layers,
    _unlike_rules,
    _parameters,
    _ties,
    _saved,
)
