"""Is it known which rows of the batch the rows of a layer's input are?

By its shape and by the layer's path; nothing else tells.
"""

import re
from collections.abc import Callable

from torch import Tensor

from lora_hub.errors import InputError
from lora_hub.runtime.step import Step

# A path of one expert among several, each a layer, that is given the tokens sent to it.
_ONE_EXPERT = re.compile(r"(^|\.)(?!shared)\w*experts?\.\d+(\.|$)")


def check_rows(step: Step | None, x: Tensor, total: int, where: Callable[[], str]) -> None:
    """Refuse an input whose rows are not known to be the `total` of the batch.

    Limit: of a layer that is given (tokens, rows, …) this is known only where there are not
    as many tokens as rows.

    Raises:
        InputError: that is so.
    """
    axes = x.dim() + (0 if x.is_floating_point() else 1)  # ids have one less than vectors
    length = x.shape[0] if x.dim() else 0
    if axes > 2 and length == total:
        return
    shape = () if step is None else step.shape
    if axes == 2 and _tells_rows(length, total, shape, is_ids=x.dim() == 1):
        is_any_order = total > 1 and _ONE_EXPERT.search(where())
        if not is_any_order:
            return
    raise InputError(
        f"the layer was given {list(x.shape)}, and {total} rows have adapters of their "
        "own, so which of them these are is not known",
        where=where(),
        hint="give the model as many rows as there are entries; each=... where one "
        "entry stands for several rows, as with beams or num_return_sequences",
    )


def _tells_rows(length: int, total: int, shape: tuple[int, ...], *, is_ids: bool) -> bool:
    """Return whether a single axis in front is known to be rows, or rows and tokens."""
    if len(shape) == 2 and length == shape[0] * shape[1]:
        return True
    # As many tokens as rows: ids of one axis may as well be positions.
    is_square = is_ids and len(shape) == 2 and shape[0] == shape[1]
    return length == total and not is_square
