"""The weight of a layer as it is stored ↔ as the matrix (out, in) that updates speak of.

`base/orientation.py` says of a checkpoint whether a weight is stored as (in, out); a layer
in memory is asked itself (`runtime/layers.py`).
"""

from jaxtyping import Shaped
from torch import Tensor

from lora_hub.manifest.document import Layer


def to_matrix(
    weight: Shaped[Tensor, "..."], layer: Layer, *, is_transposed: bool
) -> Shaped[Tensor, "*experts out inp"]:
    """Return the weight as (out, in), or (experts, out, in): a view where it can be one.

    Args:
        weight: as stored: (out, in), or (in, out) where `is_transposed`; a convolution's
            (out, channels, *kernel); experts' with one more axis in front. Experts' weight
            of two axes is (out, in) always and counts as one expert, as PEFT has it.
        layer: what kind of layer it is of.
        is_transposed: whether it is stored as (in, out).
    """
    if layer == "conv":
        return weight.flatten(start_dim=1)
    if layer == "experts" and weight.dim() == 2:
        return weight.unsqueeze(0)
    return weight.transpose(-2, -1) if is_transposed else weight


def from_matrix(
    matrix: Shaped[Tensor, "*experts out inp"],
    shape: tuple[int, ...],
    layer: Layer,
    *,
    is_transposed: bool,
) -> Shaped[Tensor, "..."]:
    """Return the matrix in the shape the weight is stored in: `to_matrix` taken back."""
    if layer != "conv" and is_transposed and not (layer == "experts" and len(shape) == 2):
        return matrix.transpose(-2, -1)
    return matrix.reshape(shape)
