"""What kind of layer factors are for, and whether their shapes are those of one.

`UpdateSource` tells the shapes of each kind.
"""

import math

from lora_hub.embeddings import EMBEDDINGS, last_part
from lora_hub.errors import FormatError
from lora_hub.formats.factors import Factors
from lora_hub.formats.matrices import Matrix
from lora_hub.manifest.document import Layer
from lora_hub.tensors.arrays import FLOATS


def layer_of(target: str, a: Matrix) -> Layer:
    """Return the kind of layer that a factor is for, by its axes and the target's name.

    An embedding's factors lie in some dialects like those of a linear layer, and its
    stored weight is the transpose; only the name of the module tells.
    """
    if len(a.shape) > 2:
        return "conv"
    return "embedding" if last_part(target) in EMBEDDINGS else "linear"


def check_factors(part: Factors, where: str) -> None:
    """Raise `FormatError` unless the shapes are those of the layer and agree."""
    a, b, target = part.a, part.b, part.target
    shapes = f"the factors are {list(a.shape)} and {list(b.shape)}"
    axes = (3, 4, 5) if part.layer == "conv" else (2,)
    if len(a.shape) not in axes or len(b.shape) != len(a.shape):
        kind = {3: "experts or a convolution", 4: "a convolution", 5: "a convolution"}
        what = kind.get(len(a.shape), f"no {part.layer} layer")
        raise FormatError(
            f"{target}: {shapes}, as for {what}; such are not read here", where=where
        )
    if 0 in a.shape + b.shape or part.rank < 1 or not _is_one_rank(part):
        raise FormatError(
            f"{target}: {shapes}; expected [rank, in] and [out, rank] of one rank",
            where=where,
        )
    if a.dtype != b.dtype or a.dtype not in FLOATS:
        raise FormatError(
            f"{target}: the factors are {a.dtype} and {b.dtype}; expected one of "
            f"{', '.join(sorted(FLOATS))} for both",
            where=where,
        )
    for whole, what in ((part.magnitude, "magnitude"), (part.bias, "bias")):
        if whole and (math.prod(whole.shape) != b.shape[0] or whole.dtype not in FLOATS):
            raise FormatError(
                f"{target}: its {what} is {whole.dtype} of shape {list(whole.shape)}, and "
                f"there are {b.shape[0]} outputs",
                where=where,
            )


def _is_one_rank(part: Factors) -> bool:
    a, b = part.a.shape, part.b.shape
    if part.layer == "conv":
        # A convolution in groups: b has the ranks of one group, and a those of all.
        return a[0] % b[1] == 0 and b[0] % (a[0] // b[1]) == 0 and set(b[2:]) == {1}
    return a[0] == b[1] and a[0] % part.experts == 0
