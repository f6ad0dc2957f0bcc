"""Are the layers that adapters act on still those the model calls?

A layer that somebody took out of the model is not called any more, so that what is added
to its output would do nothing, and nobody would hear of it.
"""

from collections.abc import Iterable

from torch import nn


class InPlace:
    """Modules of a model that are watched; looking costs one look a module and parent."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._watched: dict[nn.Module, str] = {}  # and where they were
        # (what holds it, its name there, the module), for each module and what holds it
        self._edges: list[tuple[dict[str, nn.Module | None], str, nn.Module]] = []

    def watch(self, modules: Iterable[nn.Module]) -> None:
        """Watch these, too."""
        new = set(modules) - self._watched.keys()
        if not new:
            return
        known = {id(child) for _, _, child in self._edges}
        edges: dict[str, nn.Module] = {}
        for path, module in self._model.named_modules():
            edges[path] = module
            if module in new:
                self._watched[module] = path
                self._add(path, edges, known)

    def _add(self, path: str, found: dict[str, nn.Module], known: set[int]) -> None:
        while path and id(found[path]) not in known:
            known.add(id(found[path]))
            above, _, name = path.rpartition(".")
            home = found[above]._modules  # noqa: SLF001  (torch's own name)
            self._edges.append((home, name, found[path]))
            path = above

    def gone(self) -> set[nn.Module]:
        """Return those watched modules that the model does not hold any more."""
        if all(home.get(name) is module for home, name, module in self._edges):
            return set()
        # Somewhere else in the model they are as good.
        return self._watched.keys() - set(self._model.modules())

    def path(self, module: nn.Module) -> str:
        """Return where a watched module was."""
        return self._watched[module]
