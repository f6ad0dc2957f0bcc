"""Which linear modules a base has, for dialects that do not keep a module's path.

Read from the headers of the base's safetensors files; no tensor is read. A pipeline as
diffusers saves it has a folder for each component, a checkpoint has its files at the top.
"""

from collections.abc import Mapping
from pathlib import Path

from lora_hub.errors import InputError
from lora_hub.tensors.file import TensorFile

# The components of diffusers' pipelines that adapters change.
COMPONENTS = (
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
    "transformer",
    "transformer_2",
    "unet",
)

_SUFFIX = ".weight"


def modules_of(base: Path) -> dict[str, frozenset[str]]:
    """Return component → paths of its modules whose weight has two axes.

    A checkpoint that is no pipeline is the one component "".

    Raises:
        InputError: the folder holds no safetensors files, or one cannot be read.
    """
    parts = [name for name in COMPONENTS if (base / name).is_dir()]
    found = {name: _modules(base / name) for name in parts} or {"": _modules(base)}
    if not any(found.values()):
        raise InputError(
            "holds no safetensors file with weights of linear layers",
            where=str(base),
            hint="name the folder of a checkpoint, or of a pipeline as diffusers saves it",
        )
    return found


def _modules(folder: Path) -> frozenset[str]:
    names = set()
    for path in sorted(folder.glob("*.safetensors")):
        with TensorFile.open(path) as file:
            names |= {
                name.removesuffix(_SUFFIX)
                for name, tensor in file.header.tensors.items()
                if name.endswith(_SUFFIX) and len(tensor.shape) == 2
            }
    return frozenset(names)


def of_component(target: str) -> tuple[str, str]:
    """Return the component and the path within it; ("", target) where there is none."""
    first, dot, rest = target.partition(".")
    return (first, rest) if dot and first in COMPONENTS else ("", target)


def by_component(targets: Mapping[str, object]) -> dict[str, list[str]]:
    """Return component → its targets, whole, in order."""
    found: dict[str, list[str]] = {}
    for target in sorted(targets):
        found.setdefault(of_component(target)[0], []).append(target)
    return found
