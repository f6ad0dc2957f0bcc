"""A pipeline as diffusers saves it: several checkpoints, a folder each, as one `BaseView`.

`model_index.json` names the components; those that hold weights are read, and the name of
the component stands before the name of each tensor: `unet.conv_in.weight`.
"""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from lora_hub import strict_json
from lora_hub.base.folder import FolderBase
from lora_hub.errors import InputError
from lora_hub.manifest.document import BaseConfig
from lora_hub.tensors.checkpoint import STEM
from lora_hub.tensors.foreign import PICKLE_SUFFIXES

INDEX_NAME = "model_index.json"

# What diffusers' own models call their weights; those of transformers say `model`.
_DIFFUSERS_STEM = "diffusion_pytorch_model"
_WEIGHTS = (".safetensors", *PICKLE_SUFFIXES)


class PipelineBase:
    """The base in a pipeline's folder; closing it closes all components.

    Args:
        folder: of the pipeline.
        class_name: of the pipeline, "" where nothing says.
        components: name → base.
    """

    def __init__(
        self, folder: Path, class_name: str, components: Mapping[str, FolderBase]
    ) -> None:
        self.folder = folder
        self.where = str(folder)
        self.config = BaseConfig(architectures=(class_name,) if class_name else ())
        self.components = components
        self.tensors: Mapping[str, tuple[str, tuple[int, ...]]] = {
            f"{component}.{name}": tensor
            for component, base in components.items()
            for name, tensor in base.tensors.items()
        }

    @classmethod
    def open(cls, folder: Path, cache: Path | None = None) -> Self:
        """Return the base in a pipeline's folder.

        Raises:
            DocumentError: `model_index.json` is malformed.
            InputError: no component holds weights; else as `Checkpoint.open`.
        """
        index = strict_json.read_object(folder / INDEX_NAME)
        with contextlib.ExitStack() as opened:
            components = {
                name: opened.enter_context(
                    FolderBase.open(folder / name, cache, _stem(folder / name))
                )
                for name in _folders(folder)
                if name in index and _holds_weights(folder / name)
            }
            opened.pop_all()
        if not components:
            raise InputError(
                f"no component of {INDEX_NAME} holds weights",
                where=str(folder),
                hint="name the folder of a pipeline as diffusers saves it, fetched whole",
            )
        class_name = index.get("_class_name")
        return cls(folder, class_name if isinstance(class_name, str) else "", components)

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(base.size_bytes for base in self.components.values())

    def digest(self, name: str, as_dtype: str | None = None) -> str | None:
        """Return the digest of a tensor, see `BaseView.digest`."""
        component, _, rest = name.partition(".")
        return self.components[component].digest(rest, as_dtype)

    def close(self) -> None:
        for base in self.components.values():
            base.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def open_base(folder: Path, cache: Path | None = None) -> FolderBase | PipelineBase:
    """Return the base in a folder: a checkpoint, or a pipeline of several.

    Args:
        folder: the checkpoint's or the pipeline's.
        cache: folder where digests are kept between runs; None keeps none.

    Raises:
        InputError, DocumentError, TensorFileError: as `Checkpoint.open`.
    """
    if (folder / INDEX_NAME).is_file():
        return PipelineBase.open(folder, cache)
    return FolderBase.open(folder, cache)


def _folders(folder: Path) -> list[str]:
    try:
        return sorted(path.name for path in folder.iterdir() if path.is_dir())
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(folder)) from error


def _holds_weights(folder: Path) -> bool:
    # Schedulers and tokenizers are components without weights.
    try:
        return any(path.name.endswith(_WEIGHTS) for path in folder.iterdir())
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(folder)) from error


def _stem(folder: Path) -> str:
    names = (path.name for path in folder.iterdir())
    is_diffusers = any(name.startswith(f"{_DIFFUSERS_STEM}.safetensors") for name in names)
    return _DIFFUSERS_STEM if is_diffusers else STEM
