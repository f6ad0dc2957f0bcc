"""Does this adapter fit this base? A verdict with its reasons, and nothing half-applied.

Three policies, chosen by the manifest or by the caller:

    struct    the targets exist and have the recorded shapes; weights are not compared
    targets   the targeted tensors are, byte for byte, those the adapter was made on
    exact     all tensors of the base are

What costs nothing is asked first: tensors are hashed only when names, shapes and dtypes
leave no doubt. A base whose tensors were widened exactly (bf16 loaded as float32) fits,
because its values are the same.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lora_hub.base.stored import Stored, stored
from lora_hub.base.structure import is_resized, size
from lora_hub.base.view import WIDER, BaseView, digests, root_of, struct_of
from lora_hub.errors import FitError
from lora_hub.manifest.document import Base, BaseConfig, BaseTarget, Policy


@dataclass(frozen=True, slots=True)
class Fit:
    """An adapter and a base that belong together.

    Attributes:
        checked: how many tensors' contents were compared.
        total: how many tensors the policy asks about: targets, or with "exact" all.
        note: what a person should know about this match, "" where nothing.
    """

    policy: Policy
    checked: int
    total: int
    note: str = ""


# Why a base does not fit, the most telling first. A type of its own, so that a judge
# returns either this or a Fit.
Reasons = tuple[str, ...]


def check_fit(base: Base, view: BaseView, *, policy: Policy | None = None) -> Fit:
    """Return how the base at hand was found to be the recorded one, or one of its variants.

    Args:
        base: what the manifest recorded.
        view: the base at hand.
        policy: what must match; the manifest's own without.

    Raises:
        FitError: it is another base. The reasons are told apart: another architecture,
            other layers, other shapes, another dtype, other weights of equal shapes.
    """
    verdict = _JUDGES[policy or base.policy](base, view)
    if isinstance(verdict, Fit):
        return verdict
    variant = _variant(base, view, policy or base.policy)
    if variant is not None:
        return variant
    raise FitError(
        "; ".join(verdict), where=view.where, hint=_hint(base, view), reasons=verdict
    )


def _judge_struct(base: Base, view: BaseView) -> Fit | Reasons:
    # Nothing else tells llama from mistral here, so the architecture counts by itself.
    reasons = _architecture(base.config, view.config) or _structure(base, view)
    if reasons:
        return _in_context(base, view, _structure(base, view))
    return Fit(
        "struct", 0, len(base.targets), "names and shapes were compared, weights were not"
    )


def _judge_targets(base: Base, view: BaseView) -> Fit | Reasons:
    reasons = _structure(base, view) or _dtypes(base, view) or _weights(base, view)
    if reasons:
        return _in_context(base, view, reasons)
    total = len(base.targets)
    return Fit("targets", total, total, _widened(base, view))


def _judge_exact(base: Base, view: BaseView) -> Fit | Reasons:
    reasons = _structure(base, view) or _dtypes(base, view) or _whole(base, view)
    if reasons:
        return _in_context(base, view, reasons)
    total = len(view.tensors)
    return Fit("exact", total, total, _widened(base, view))


_JUDGES: Mapping[Policy, Callable[[Base, BaseView], Fit | Reasons]] = {
    "struct": _judge_struct,
    "targets": _judge_targets,
    "exact": _judge_exact,
}


def _in_context(base: Base, view: BaseView, reasons: Reasons) -> Reasons:
    """Put before the reasons what explains them: the architecture, the layers."""
    return (
        *_architecture(base.config, view.config),
        *_layers(base.config, view.config),
        *reasons,
    )


def _architecture(made_for: BaseConfig, found: BaseConfig) -> Reasons:
    # One model_type has several architectures (with a head for text, for classes), and
    # adapters of one fit the other; so these are compared only where there is no type.
    if made_for.model_type and found.model_type:
        same = made_for.model_type == found.model_type
    elif made_for.architectures and found.architectures:
        same = bool({*made_for.architectures} & {*found.architectures})
    else:
        same = True
    if same:
        return ()
    return (
        (
            f"the base is another architecture, {_called(found)}, the adapter was made for "
            f"{_called(made_for)}"
        ),
    )


def _layers(made_for: BaseConfig, found: BaseConfig) -> Reasons:
    if None in (made_for.num_layers, found.num_layers):
        return ()
    if made_for.num_layers == found.num_layers:
        return ()
    return (
        (
            f"the base has {found.num_layers} layers, the adapter was made for "
            f"{made_for.num_layers}"
        ),
    )


def _structure(base: Base, view: BaseView) -> Reasons:
    """Compare names and shapes of the targets."""
    found = [(target, _place(target, view)) for target in base.targets]
    missing = [target.name for target, place in found if place is None]
    other = [
        (target, place.shape)
        for target, place in found
        if place is not None and place.shape != target.shape
    ]
    total = len(base.targets)
    reasons = []
    if len(missing) == total:
        reasons.append(
            f"none of the {total} targets exists in the base, first {missing[0]}"
        )
    elif missing:
        reasons.append(
            f"{len(missing)} of {total} targets do not exist, first {missing[0]}"
        )
    if other:
        target, shape = other[0]
        why = ""
        if is_resized(target.name, shape, target.shape):
            why = ": the vocabulary was resized, here or before the training"
        reasons.append(
            f"{len(other)} of {total} targets have another shape, first {target.name} is "
            f"{size(shape)}, expected {size(target.shape)}{why}"
        )
    return tuple(reasons)


def _dtypes(base: Base, view: BaseView) -> Reasons:
    """Compare dtypes of the targets; a wider one may hold the same values."""
    other = [target for target in base.targets if not _may_hold(target, view)]
    if not other:
        return ()
    return (
        (
            f"the base holds {_dtype(other[0], view)}, the adapter was made on "
            f"{other[0].dtype}; {len(other)} of {len(base.targets)} targets differ, "
            f"first {other[0].name}"
        ),
    )


def _weights(base: Base, view: BaseView) -> Reasons:
    """Compare the bytes of the targets."""
    wanted = [
        (_named(target, view), target.dtype if _is_widened(target, view) else None)
        for target in base.targets
    ]
    other = [
        (target, found)
        for target, found in zip(base.targets, digests(view, wanted), strict=True)
        if found != target.sha256
    ]
    if not other:
        return ()
    target, found = other[0]
    return (
        f"the base holds other weights: {len(other)} of {len(base.targets)} targeted "
        f"tensors differ, first {target.name} "
        + (
            f"is {found}, expected {target.sha256}"
            if found
            else f"holds values that {target.dtype} does not have"
        ),
    )


def _whole(base: Base, view: BaseView) -> Reasons:
    """Compare all tensors."""
    struct = struct_of(view)
    if struct != base.struct:
        return (
            (
                "the base has other tensors beside the targets: its structure is "
                f"{struct}, expected {base.struct}"
            ),
        )
    # A tensor that was widened has another leaf under its own dtype, so only the recorded
    # one can give the recorded root.
    recorded = {target.dtype for target in base.targets if _is_widened(target, view)}
    dtypes = sorted(recorded) or (None,)
    roots = [root_of(view, dtype) for dtype in dtypes]
    if base.root in roots:
        return ()
    return _weights(base, view) or (
        (
            "the targeted tensors are those recorded, others are not: "
            + (
                f"the root is {roots[0]}, expected {base.root}"
                if roots[0]
                else f"one holds values that {dtypes[0]} does not have"
            )
        ),
    )


def _variant(base: Base, view: BaseView, policy: Policy) -> Fit | None:
    root = root_of(view) if base.variants else None
    for variant in base.variants:
        if variant.root == root:
            tested = "tested" if variant.tested else "not tested"
            note = (
                f"the base is the variant {variant.dtype} ({variant.relation}) that the "
                f"adapter allows, {tested} by its author"
            )
            return Fit(policy, len(view.tensors), len(view.tensors), note)
    return None


def _place(target: BaseTarget, view: BaseView) -> Stored | None:
    return stored(view.tensors, view.config, target.name)


def _named(target: BaseTarget, view: BaseView) -> str:
    """Return what the view calls the tensor; of several, the weight's."""
    place = _place(target, view)
    return place.parts[0] if place and len(place.parts) == 1 else target.name


def _dtype(target: BaseTarget, view: BaseView) -> str:
    """Return the dtype of a target, "" where the base does not have it."""
    place = _place(target, view)
    return place.dtype if place else ""


def _is_widened(target: BaseTarget, view: BaseView) -> bool:
    return _dtype(target, view) in WIDER.get(target.dtype, ())


def _may_hold(target: BaseTarget, view: BaseView) -> bool:
    return _dtype(target, view) == target.dtype or _is_widened(target, view)


def _widened(base: Base, view: BaseView) -> str:
    for target in base.targets:
        if _is_widened(target, view):
            return (
                f"the base is held in {_dtype(target, view)}, into which the recorded "
                f"{target.dtype} weights were widened exactly"
            )
    return ""


def _hint(base: Base, view: BaseView) -> str:
    recorded = base.targets[0].dtype
    held = _dtype(base.targets[0], view) or recorded
    if base.hints:
        hint = base.hints[0]
        revision = f"@{hint.revision}" if hint.revision else ""
        name = f"{hint.hub}:{hint.repo}{revision}"
    else:
        name = f"the base of root {base.root}"
    wider = " or ".join(sorted(WIDER.get(recorded, ())))
    if held != recorded and held not in WIDER.get(recorded, ()) and wider:
        return (
            f"the adapter was made on {name}; load it in {recorded}, or widened to {wider}"
        )
    return f"the adapter was made on {name}"


def _called(config: BaseConfig) -> str:
    names = ", ".join(config.architectures)
    if config.model_type and names:
        return f"{config.model_type} ({names})"
    return config.model_type or names
