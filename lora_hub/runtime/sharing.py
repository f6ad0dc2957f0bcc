"""Which tensors of a model are one: an embedding and its head, or views of one memory.

Told by where numbers lie and how, since two parameters may be made of the same memory as
well as one parameter stand in two modules.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Where a tensor's numbers lie and how: tensors of one address are one tensor.
Address = tuple[object, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Use:
    """A place that holds a tensor: its full name, the module, the name there."""

    full: str
    module: nn.Module
    name: str

    @property
    def home(self) -> dict[str, Tensor | None]:
        """The dictionary of the module that holds it."""
        module = self.module
        is_parameter = self.name in module._parameters  # noqa: SLF001
        return module._parameters if is_parameter else module._buffers  # type: ignore[return-value]  # noqa: SLF001


class Sharing:
    """Which tensors of a model are one, and which lie over one another."""

    def __init__(self, model: nn.Module) -> None:
        self._uses: dict[Address, list[Use]] = {}
        spans: list[tuple[object, int, int, Address]] = []
        for path, module in model.named_modules():
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):  # noqa: SLF001
                if tensor is None or tensor.is_meta or not is_plain(tensor):
                    continue
                address = address_of(tensor)
                use = Use(f"{path}.{name}" if path else name, module, name)
                if address not in self._uses and tensor.numel():
                    start = tensor.data_ptr()
                    spans.append(
                        (str(tensor.device), start, start + _span(tensor), address)
                    )
                self._uses.setdefault(address, []).append(use)
        self._overlapping: set[Address] = set()
        before: tuple[object, int, int, Address] | None = None
        for span in sorted(spans, key=lambda span: (span[0], span[1], span[2])):
            if before is not None and before[0] == span[0] and span[1] < before[2]:
                self._overlapping |= {before[3], span[3]}
            if before is None or before[0] != span[0] or span[2] > before[2]:
                before = span

    def uses(self, tensor: Tensor) -> tuple[Use, ...]:
        """Return the places that hold the tensor, in the order of the model."""
        return tuple(self._uses.get(address_of(tensor), ()))

    def overlaps(self, tensor: Tensor) -> bool:
        """Return whether another tensor has a part of its memory."""
        return address_of(tensor) in self._overlapping


def address_of(tensor: Tensor) -> Address:
    if not tensor.numel():
        return (id(tensor),)
    layout = tensor.dtype, tuple(tensor.shape), tensor.stride()
    return (tensor.device, tensor.data_ptr(), *layout)


def _span(tensor: Tensor) -> int:
    """Return the number of bytes from its first element to behind its last."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return (sum((size - 1) * step for size, step in steps) + 1) * tensor.itemsize


def is_plain(tensor: Tensor) -> bool:
    """Return whether it is a tensor or a parameter and none of their many subclasses."""
    return type(tensor.data) is Tensor and tensor.layout == torch.strided
