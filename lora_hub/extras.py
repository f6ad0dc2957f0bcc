"""Import a package that only some features need, or say how to get it."""

import importlib
from types import ModuleType

from lora_hub.errors import MissingExtra


def require(module: str, *, extra: str) -> ModuleType:
    """Return the imported module.

    Raises:
        MissingExtra: it is not installed; the hint names the extra that brings it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing != module.partition(".")[0]:
            raise  # the package is there and broken: not for us to explain
        raise MissingExtra(
            f"the package {module!r} is needed for this and is not installed",
            hint=f"pip install 'lora-hub[{extra}]'",
        ) from error
