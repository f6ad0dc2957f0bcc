"""Are two adapters the same one? By digest, and where that is not known, bit for bit."""

from dataclasses import fields

import torch
from torch import Tensor

from lora_hub.adapter.adapter import Adapter
from lora_hub.adapter.update import Update
from lora_hub.composing.replaced import is_same as is_same_tensor


def is_same(one: Adapter, other: Adapter) -> bool:
    """Return whether they are one package, or, where that is not known, the same bits."""
    if one is other or one.digest or other.digest:
        return one is other or one.digest == other.digest
    return (
        one.updates.keys() == other.updates.keys()
        and one.replaced.keys() == other.replaced.keys()
        and one.alora_tokens == other.alora_tokens
        and one.ties_weights == other.ties_weights
        and all(_is_equal(each, other.updates[key]) for key, each in one.updates.items())
        and all(
            is_same_tensor(each, other.replaced[key]) for key, each in one.replaced.items()
        )
    )


def _is_equal(one: Update, other: Update) -> bool:
    for field in fields(Update):
        this, that = getattr(one, field.name), getattr(other, field.name)
        if isinstance(this, Tensor) and isinstance(that, Tensor):
            if this.dtype != that.dtype or not torch.equal(this, that):
                return False
        elif isinstance(this, Tensor) or isinstance(that, Tensor) or this != that:
            return False
    return True
