"""Do updates of one target change the same weight? What is known of both must agree."""

from math import prod

from lora_hub.adapter.update import Update


def disagreement(one: Update, other: Update) -> tuple[str, str] | None:
    """Return what weights two updates of a target are for where they differ, else None.

    An update without factors may not know a side of the weight, or the size of a
    convolution's kernel; what it does not know, it agrees with.
    """
    if one.layer != other.layer:
        return f"a layer of kind {one.layer}", f"one of kind {other.layer}"
    if one.rank and other.rank and one.kernel != other.kernel:
        return f"a kernel of {list(one.kernel)}", f"one of {list(other.kernel)}"
    if one.rank and other.rank and one.groups != other.groups:
        return f"a convolution of {one.groups} groups", f"one of {other.groups}"
    ours, theirs = _shape(one, other), _shape(other, one)
    same = len(ours) == len(theirs) and all(
        not this or not that or this == that
        for this, that in zip(ours, theirs, strict=True)
    )
    if same:
        return None
    return f"a weight of shape {list(ours)}", f"one of shape {list(theirs)}"


def _shape(update: Update, other: Update) -> tuple[int, ...]:
    """Return the shape; of a convolution's columns by channels, all those of the kernel."""
    *front, inp = update.shape
    if update.layer == "conv" and not update.kernel and inp != other.shape[-1]:
        inp *= prod(other.kernel)
    return *front, inp
