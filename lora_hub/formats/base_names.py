"""Which layers a base has, for dialects that do not keep a module's path or its shape.

Read from the headers of the base's safetensors files; no tensor is read. A pipeline as
diffusers saves it has a folder for each component, a checkpoint has its files at the top.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from lora_hub import strict_json
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

# Language models keep their layers in a `transformer` of their own: GPT-2, GPT-J, Falcon
# and BLOOM (h), XLNet (layer), ChatGLM (encoder), MPT and DBRX (blocks), and what is around
# them. diffusers' transformers have none of these: Wan's `blocks` hold attn1 and attn2.
_OF_LANGUAGE = re.compile(
    r"transformer\.(h|layer|encoder\.layers)\.\d+(\..+)?"
    r"|transformer\.blocks\.\d+\.(attn|norm_1|norm_2|norm_attn_norm)(\..+)?"
    r"|transformer\.blocks\.\d+\.ffn\.(up_proj|down_proj|gate_proj|router|experts)(\..+)?"
    r"|transformer\.(wte|wpe|word_embeddings|word_embedding|word_embeddings_layernorm|ln_f"
    r"|embedding|output_layer|mask_emb)(\..+)?"
)

_SUFFIX = ".weight"

# Linear layers and embeddings have weights of two axes, convolutions of three to five.
_AXES = (2, 3, 4, 5)

# path of a module → shape of its weight, as the checkpoint stores it
Shapes = Mapping[str, tuple[int, ...]]


def modules_of(base: Path) -> dict[str, Shapes]:
    """Return component → its modules whose weight has two to five axes.

    A checkpoint that is no pipeline is the one component "".

    Raises:
        InputError: the folder holds no safetensors files, or one cannot be read.
    """
    parts = [name for name in COMPONENTS if (base / name).is_dir()]
    found = {name: _modules(base / name) for name in parts} or {"": _modules(base)}
    if not any(found.values()):
        raise InputError(
            "holds no safetensors file with weights of layers",
            where=str(base),
            hint="name the folder of a checkpoint, or of a pipeline as diffusers saves it",
        )
    return found


def shape_at(modules: Mapping[str, Shapes], target: str) -> tuple[int, ...]:
    """Return the shape of a target's weight as the base stores it, () where it has none."""
    component, path = ("", target) if "" in modules else of_component(target)
    return tuple(modules.get(component, {}).get(path, ()))


def is_tied(base: Path) -> bool:
    """Return whether the output layer of a language model is its embedding.

    So it is where the config says so, or the checkpoint holds no `lm_head`.

    Raises:
        InputError: as `modules_of`.
    """
    path = base / "config.json"
    config = strict_json.read_object(path) if path.is_file() else {}
    is_said = config.get("tie_word_embeddings") is True
    return is_said or "lm_head" not in modules_of(base).get("", {})


def _modules(folder: Path) -> Shapes:
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with TensorFile.open(path) as file:
            shapes |= {
                name.removesuffix(_SUFFIX): tensor.shape
                for name, tensor in file.header.tensors.items()
                if name.endswith(_SUFFIX) and len(tensor.shape) in _AXES
            }
    return shapes


def of_component(target: str) -> tuple[str, str]:
    """Return the component and the path within it; ("", target) where there is none.

    `transformer.h.0.attn.c_attn` is a layer of GPT-2, which is in no pipeline.
    """
    first, dot, rest = target.partition(".")
    is_component = dot and first in COMPONENTS and not _OF_LANGUAGE.fullmatch(target)
    return (first, rest) if is_component else ("", target)


def by_component(targets: Mapping[str, object]) -> dict[str, list[str]]:
    """Return component → its targets, whole, in order."""
    found: dict[str, list[str]] = {}
    for target in sorted(targets):
        found.setdefault(of_component(target)[0], []).append(target)
    return found
