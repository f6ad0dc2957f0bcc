"""A model in memory as a `BaseView`: its tensors told by content, as those of a folder are.

Digests are those of the bytes a checkpoint would hold, whatever device the model is on.
A model that was loaded in a wider dtype than its checkpoint's is recognised
(`base/narrow.py`).
"""

import hashlib
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_hub.adapter.tensor_bytes import NAMES, TORCH, to_bytes
from lora_hub.base.folder import config_of
from lora_hub.base.narrow import narrow
from lora_hub.base.view import WIDER
from lora_hub.errors import InconclusiveError
from lora_hub.manifest.document import BaseConfig
from lora_hub.runtime.quantised import kind_of, numbers_dtype, shape_of

# Elements hashed at a time: bounds what is copied and what is converted. Beside the CPU,
# small enough that a piece stays in the second-level cache between its conversion and its
# hash; from another device, large enough that copying it takes longer than asking for it.
CHUNK_ELEMENTS = 1 << 19
CHUNK_ELEMENTS_FAR = 1 << 22


@dataclass(frozen=True, slots=True)
class Seen:
    """A digest, and of what: this very tensor, where it lay, how often it had been changed.

    The tensor has to be the same object, because another one may come to lie in its place.
    """

    tensor: weakref.ref[Tensor]
    address: int
    version: int
    digest: str | None

    def is_still(self, tensor: Tensor) -> bool:
        return (
            self.tensor() is tensor
            and self.address == tensor.data_ptr()
            and self.version == tensor._version  # noqa: SLF001  (torch's own name)
        )


# A tensor's name and the dtype hashed → what was found.
Known = dict[tuple[str, str], Seen]


class ModelBase:
    """The base that a model in memory is, as it is now.

    Digests are taken from `known`, and put there, for as long as a tensor is the same,
    lies where it lay and was not changed by torch's own count. Limit: writing through
    `tensor.data` escapes that count.
    """

    def __init__(self, model: nn.Module, known: Known | None = None) -> None:
        self._tensors = dict(_tensors_of(model))
        self._known: Known = {} if known is None else known
        self.where = f"the model ({type(model).__name__})"
        self.config = _config_of(model)
        self.tensors: Mapping[str, tuple[str, tuple[int, ...]]] = {
            name: _held(tensor) for name, tensor in self._tensors.items()
        }

    def digest(self, name: str, as_dtype: str | None = None) -> str | None:
        """Return the digest of a tensor, see `BaseView.digest`.

        Raises:
            InconclusiveError: the tensor's numbers are not in memory, or in another form.
        """
        tensor = self._tensors[name]
        dtype, _ = self.tensors[name]
        wanted = as_dtype or dtype
        if wanted != dtype and dtype not in WIDER.get(wanted, ()):
            return None
        if tensor.is_meta:
            raise InconclusiveError(
                "the tensor is on the meta device, so its bytes cannot be compared",
                where=name,
                hint="load the model whole, or compare names and shapes: policy='struct'",
            )
        if (kind := kind_of(tensor)) is not None:  # it has a dtype, and other bytes
            raise InconclusiveError(
                f"the tensor is a {kind}: quantised, or spread over "
                "devices, so its bytes are not those of a checkpoint",
                where=name,
                hint="compare names and shapes: policy='struct'",
            )
        if tensor.is_inference():  # has no counter
            return _digest(tensor, dtype, wanted)
        seen = self._known.get((name, wanted))
        if seen is None or not seen.is_still(tensor):
            # Counted before: what is changed meanwhile is hashed anew the next time.
            address, version = tensor.data_ptr(), tensor._version  # noqa: SLF001
            found = _digest(tensor, dtype, wanted)
            seen = Seen(weakref.ref(tensor), address, version, found)
            self._known[name, wanted] = seen
        return seen.digest


def _held(tensor: Tensor) -> tuple[str, tuple[int, ...]]:
    """Return dtype and shape of the numbers, which may lie packed."""
    dtype = numbers_dtype(tensor)
    return NAMES.get(dtype, str(dtype)), shape_of(tensor)


def _digest(tensor: Tensor, dtype: str, wanted: str) -> str | None:
    hasher = hashlib.sha256()
    for piece in _pieces(tensor.detach()):
        for part in torch.split(piece, CHUNK_ELEMENTS):
            data = to_bytes(part) if wanted == dtype else _narrowed(part, dtype, wanted)
            if data is None:
                return None
            hasher.update(data)
    return "sha256:" + hasher.hexdigest()


def _narrowed(tensor: Tensor, dtype: str, wanted: str) -> memoryview | None:
    """Return the bytes of the tensor in a narrower dtype, None unless all values survive.

    As `narrow`, with torch's conversions, which are many times as fast as numpy's.
    """
    wide = to_bytes(tensor)
    if wanted == "BF16":  # for which numpy converts nothing
        return narrow(wide, dtype, wanted)
    import numpy as np

    small = tensor.to(TORCH[wanted])
    back = to_bytes(small.to(tensor.dtype))
    is_same = np.array_equal(np.frombuffer(back, "<u4"), np.frombuffer(wide, "<u4"))
    return to_bytes(small) if is_same else None


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Give the elements in their order, row-major, beside the CPU.

    Each piece is valid until the next is asked for. A contiguous tensor that is there
    already is not copied; one that is not contiguous is, by some rows at a time.
    """
    if not tensor.is_contiguous():
        rows = max(1, CHUNK_ELEMENTS * len(tensor) // tensor.numel())
        for some in torch.split(tensor, rows):
            yield from _pieces(some.contiguous())
        return
    flat = tensor.view(-1)
    if tensor.is_cpu:
        yield flat
        return
    # One buffer for all pieces; a GPU writes to pinned memory by itself.
    size = min(len(flat), CHUNK_ELEMENTS_FAR)
    buffer = torch.empty(size, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    for piece in torch.split(flat, CHUNK_ELEMENTS_FAR):
        yield buffer[: len(piece)].copy_(piece)


def _tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Give what `save_pretrained` writes: each tied tensor once, by its first name."""
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor


def _config_of(model: nn.Module) -> BaseConfig:
    config = getattr(model, "config", None)  # transformers' models have one
    to_dict = getattr(config, "to_dict", None)
    return config_of(to_dict() if callable(to_dict) else {})
