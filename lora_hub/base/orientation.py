"""How a base stores the weight of a layer: as (out, in), or the other way round.

Factors are told as (out, in) whatever the layer. Most layers store their weight so; an
embedding, GPT-2's Conv1D and the experts of a few models store the transpose. Shapes do not
tell the two apart where they are square, so the kind of layer and the model's type do, and
shapes must agree.

Source: transformers 5.23.0, the uses of `pytorch_utils.Conv1D` and `is_transposed=True`.
"""

from collections.abc import Mapping
from math import prod

from lora_hub.manifest.document import Layer

Shape = tuple[int, ...]

_CONV1D = frozenset({"c_attn", "c_fc", "c_proj", "q_attn"})
_EXPERTS = frozenset({"gate_up_proj", "down_proj"})

# model_type → last parts of the names of modules (for experts: of parameters) that are
# stored as (in, out).
_TRANSPOSED: Mapping[str, frozenset[str]] = {
    "aria": _EXPERTS,
    "aria_text": _EXPERTS,
    "clvp": frozenset({"c_fc", "c_proj"}),
    "clvp_decoder": frozenset({"c_fc", "c_proj"}),
    "decision_transformer": _CONV1D,
    "gpt2": _CONV1D,
    "gpt_oss": _EXPERTS,
    "imagegpt": _CONV1D,
    "openai-gpt": _CONV1D,
    "openai_privacy_filter": _EXPERTS,
}

# A convolution has an axis for outputs, one for inputs, and one to three of its kernel.
_CONV_AXES = range(3, 6)


def stores_transposed(layer: Layer, target: str, model_type: str | None) -> bool:
    """Return whether the base stores the weight of a target as (in, out)."""
    if layer == "embedding":
        return True
    last = target.rpartition(".")[2]
    return layer != "conv" and last in _TRANSPOSED.get(model_type or "", ())


def matrix_shape(layer: Layer, shape: Shape, *, is_transposed: bool) -> Shape:
    """Return the shape of a stored weight as a matrix (out, in), experts in front.

    A convolution's inputs are its channels times the size of its kernel. A shape that the
    kind of layer cannot have comes back as it is, so that it matches nothing.
    """
    if layer == "conv":
        return (shape[0], prod(shape[1:])) if len(shape) in _CONV_AXES else shape
    return _turned(shape) if is_transposed and len(shape) > 1 else shape


def weight_shape(
    layer: Layer, rank: int, a: Shape, b: Shape, *, is_transposed: bool
) -> Shape | None:
    """Return how a base stores the weight that factors of these shapes change.

    Args:
        layer: what `a` and `b` are the factors of; `formats/source.py` tells their shapes.
        rank: of one expert.
        a: the shape of the factor that meets the input.
        b: the shape of the factor that makes the output.
        is_transposed: see `stores_transposed`.

    Returns:
        The shape; None where the two contradict each other or the rank. That of experts
        has their number in front, also where there is one.
    """
    if layer == "conv":
        return _conv_shape(rank, a, b)
    if len(a) != 2 or len(b) != 2 or rank < 1:
        return None
    if layer == "experts":
        experts, rest = divmod(a[0], rank)
        if rest or not experts or b[1] != a[0]:
            return None
        matrix: Shape = (experts, b[0], a[1])
    elif a[0] != rank or b[1] != rank:
        return None
    else:
        matrix = (b[0], a[1])
    return _turned(matrix) if is_transposed else matrix


def _conv_shape(rank: int, a: Shape, b: Shape) -> Shape | None:
    if len(a) not in _CONV_AXES or len(b) != len(a) or a[0] != rank or not b[1]:
        return None
    groups, rest = divmod(rank, b[1])  # `b` works by groups, `a` sees all channels
    if rest or set(b[2:]) != {1} or a[1] % groups or b[0] % groups:
        return None
    return (b[0], a[1] // groups, *a[2:])


def _turned(shape: Shape) -> Shape:
    return (*shape[:-2], shape[-1], shape[-2])
