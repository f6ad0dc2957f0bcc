"""Which layer of a model each target of an adapter is: all are found, or none is used."""

from collections.abc import Mapping

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lora_hub.adapter.update import Update
from lora_hub.errors import FitError

SHOWN = 3  # reasons named in one message; the error carries all of them


def layers_of(
    model: nn.Module, updates: Mapping[str, Update], *, where: str
) -> dict[str, nn.Linear]:
    """Return target → layer, for every target.

    Args:
        model: where the targets are paths of modules.
        updates: target → update; their shapes are compared with the layers'.
        where: what to call the adapter in messages.

    Raises:
        FitError: a target does not exist, is no `torch.nn.Linear`, has another shape, or is
            a layer whose `forward` torch does not call.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    layers: dict[str, nn.Linear] = {}
    reasons: list[str] = []
    for target, update in updates.items():
        module = modules.get(target)
        reason = _mismatch(module, update)
        if reason is None:
            assert isinstance(module, nn.Linear)
            layers[target] = module
        else:
            reasons.append(f"{target} {reason}")
    if reasons:
        more = len(reasons) - SHOWN
        raise FitError(
            f"{len(reasons)} of {len(updates)} targets cannot be applied: "
            + "; ".join(reasons[:SHOWN])
            + (f"; and {more} more" if more > 0 else ""),
            where=where,
            hint="nothing was loaded; give the model the adapter was made for, with its "
            "module names as they were",
            reasons=tuple(reasons),
        )
    return layers


def _mismatch(module: nn.Module | None, update: Update) -> str | None:
    """Return why the update cannot act on the module, None where it can."""
    if module is None:
        return "does not exist in the model"
    if not isinstance(module, nn.Linear):
        return f"is a {type(module).__name__}, expected a torch.nn.Linear"
    if isinstance(module, NonDynamicallyQuantizableLinear):
        # MultiheadAttention reads its weight and never calls it, so a hook has no effect.
        return "is inside a torch.nn.MultiheadAttention, which does not call it"
    found = (module.out_features, module.in_features)
    if found != update.shape:
        return f"has a weight of shape {list(found)}, the update is {list(update.shape)}"
    return None
