"""Sites: the layers of a model that adapters add to, numbered as they are met.

A number stays that of its layer as long as the host lives, so what a layer does for an
adapter is found by one look into a table, however many adapters are loaded.
"""

from collections.abc import Iterator

from torch import nn


class Sites:
    """Layer ↔ number. Layers are told apart by what they are, not by their names.

    Args:
        model: where to look for a layer's path when a message asks for it.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self._model = model
        self._numbers: dict[nn.Module, int] = {}
        self._modules: list[nn.Module] = []
        self._paths: dict[int, str] = {}

    def number(self, module: nn.Module) -> int:
        """Return the layer's number, a new one at first sight."""
        found = self._numbers.get(module)
        if found is None:
            found = self._numbers[module] = len(self._modules)
            self._modules.append(module)
        return found

    def path(self, number: int) -> str:
        """Return the layer's path in the model, its type where it is not there any more.

        It is that of the first question.
        """
        if number not in self._paths and self._model is not None:
            for path, module in self._model.named_modules():
                if module in self._numbers:
                    self._paths.setdefault(self._numbers[module], path)
        return self._paths.get(number, type(self._modules[number]).__name__)

    def __getitem__(self, number: int) -> nn.Module:
        return self._modules[number]

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self._modules)
