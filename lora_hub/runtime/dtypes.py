"""Which dtype an adapter's effect on a layer is computed in."""

import torch

from lora_hub.adapter.tensor_bytes import TORCH
from lora_hub.tensors.arrays import FLOATS

# Dtypes that torch computes in. A layer stored in another one, such as fp8, gives float32.
COMPUTES = frozenset(TORCH[name] for name in FLOATS)


def computed_in(held: torch.dtype, trained: torch.dtype | None) -> torch.dtype:
    """Return the wider of the dtypes of the layer and of the factors as they were trained.

    Args:
        held: of the layer's weight.
        trained: of the factors; None where there are none.
    """
    own = held if held in COMPUTES else torch.float32
    return own if trained is None else torch.promote_types(own, trained)
