"""A model in memory as a `BaseView`: its tensors told by content, as those of a folder are.

Digests are those of the bytes a checkpoint would hold, whatever device the model is on.
A model that was loaded in a wider dtype than its checkpoint's is recognised
(`base/narrow.py`).
"""

import hashlib
from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from lora_hub.adapter.tensor_bytes import NAMES, to_bytes
from lora_hub.base.folder import config_of
from lora_hub.base.narrow import narrow
from lora_hub.base.view import WIDER
from lora_hub.errors import InconclusiveError
from lora_hub.manifest.document import BaseConfig

# Elements hashed at a time: bounds what is copied from a device and what is converted.
CHUNK_ELEMENTS = 1 << 22

# A tensor's name and the dtype hashed → where the tensor lay, how often torch had seen it
# changed, its own dtype, and the digest.
Known = dict[tuple[str, str], tuple[int, int, str, str | None]]


class ModelBase:
    """The base that a model in memory is, as it is now.

    Digests are taken from `known`, and put there, for as long as a tensor lies where it lay
    and torch's own counter says that it was not changed. Limit: writing through
    `tensor.data` escapes that counter.
    """

    def __init__(self, model: nn.Module, known: Known | None = None) -> None:
        self._tensors = dict(_tensors_of(model))
        self._known: Known = {} if known is None else known
        self.where = f"the model ({type(model).__name__})"
        self.config = _config_of(model)
        self.tensors: Mapping[str, tuple[str, tuple[int, ...]]] = {
            name: (NAMES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape))
            for name, tensor in self._tensors.items()
        }

    def digest(self, name: str, as_dtype: str | None = None) -> str | None:
        """Return the digest of a tensor, see `BaseView.digest`.

        Raises:
            InconclusiveError: the tensor's numbers are not in memory.
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
        if tensor.is_inference():  # has no counter
            return _digest(tensor, dtype, wanted)
        now = tensor.data_ptr(), tensor._version, dtype  # noqa: SLF001  (torch's own name)
        known = self._known.get((name, wanted))
        if known is None or known[:3] != now:
            known = self._known[name, wanted] = (*now, _digest(tensor, dtype, wanted))
        return known[3]


def _digest(tensor: Tensor, dtype: str, wanted: str) -> str | None:
    hasher = hashlib.sha256()
    flat = tensor.detach().reshape(-1)
    for start in range(0, len(flat), CHUNK_ELEMENTS):
        data = to_bytes(flat[start : start + CHUNK_ELEMENTS])
        piece = data if wanted == dtype else narrow(data, dtype, wanted)
        if piece is None:
            return None
        hasher.update(piece)
    return "sha256:" + hasher.hexdigest()


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
