"""Under which names a base stores a weight that an adapter names.

An adapter names what the running model has. A checkpoint may keep the same numbers under
other names, in four ways that are exact:

    experts   transformers fuses the experts of a layer when it loads them; the file has
              each by itself, and their bytes one behind the other are the fused weight's
    router    the layer of experts itself is called otherwise in memory than in files
    tied      one tensor serves as embedding and as head, and stands under one name
    prefix    a model saved without its head lacks the first part of every name, and the
              other way round

Source: transformers 5.23.0, `conversion_mapping.py`, every entry made of MergeModulelist
and Concatenate(dim=1) alone, and the renaming of `block_sparse_moe` beside them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lora_hub.embeddings import HEADS, INPUTS, last_part
from lora_hub.manifest.document import BaseConfig

# name → dtype as safetensors spells it, and shape
Tensors = Mapping[str, tuple[str, tuple[int, ...]]]

# Last part of a fused weight → the weights of one expert in the order they are put
# together, as families of models call them.
_FUSED: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3"), ("fc1", "fc3")),
    "up_proj": (("up_proj",),),
    "down_proj": (("down_proj",), ("w2",), ("fc2",)),
}


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a base keeps a weight.

    Attributes:
        parts: names of its tensors. Of several, the bytes one behind the other are those
            of the weight, row-major.
        dtype: as safetensors spells it.
        shape: of the weight.
    """

    parts: tuple[str, ...]
    dtype: str
    shape: tuple[int, ...]


def stored(tensors: Tensors, config: BaseConfig, name: str) -> Stored | None:
    """Return where a base keeps the weight of this name, None where it has none."""
    for way in _WAYS:
        found = way(tensors, config, name)
        if found is not None:
            return found
    return None


def _as_named(tensors: Tensors, config: BaseConfig, name: str) -> Stored | None:
    if name not in tensors:
        return None
    return Stored((name,), *tensors[name])


def _fused(tensors: Tensors, config: BaseConfig, name: str) -> Stored | None:
    module, _, last = name.rpartition(".")
    above, _, experts = module.rpartition(".")
    if experts != "experts":
        return None
    for kinds in _FUSED.get(last, ()):
        for place in (f"{above}.experts", f"{_in_files(above)}.experts"):
            parts = _one_by_one(tensors, place, kinds)
            if len({tensors[part] for part in parts}) == 1:
                dtype, shape = tensors[parts[0]]
                count = len(parts) // len(kinds)
                if len(shape) == 2:
                    fused = (count, shape[0] * len(kinds), shape[1])
                    return Stored(parts, dtype, fused)
    return None


def _in_files(layer: str) -> str:
    """Return how Mixtral and its kin call a layer of experts (`….mlp`) in files."""
    return f"{layer.removesuffix('.mlp')}.block_sparse_moe"


def _router(tensors: Tensors, config: BaseConfig, name: str) -> Stored | None:
    layer = name.removesuffix(".gate.weight")
    renamed = f"{_in_files(layer)}.gate.weight"
    if not layer.endswith(".mlp") or renamed not in tensors:
        return None
    return Stored((renamed,), *tensors[renamed])


def _one_by_one(tensors: Tensors, place: str, kinds: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of the experts' weights, () where one of an expert is missing."""
    parts: list[str] = []
    expert = 0
    while f"{place}.{expert}.{kinds[0]}.weight" in tensors:
        names = [f"{place}.{expert}.{kind}.weight" for kind in kinds]
        if not all(name in tensors for name in names):
            return ()
        parts += names
        expert += 1
    return tuple(parts)


def _tied(tensors: Tensors, config: BaseConfig, name: str) -> Stored | None:
    if config.tie_word_embeddings is False or _module(name) not in HEADS:
        return None
    found = [one for one in tensors if last_part(_module(one)) in INPUTS]
    return Stored((found[0],), *tensors[found[0]]) if len(found) == 1 else None


def _module(name: str) -> str:
    """Return the module that a weight is of, "" for any other tensor."""
    module, _, last = name.rpartition(".")
    return module if last == "weight" else ""


def _prefixed(tensors: Tensors, config: BaseConfig, name: str) -> Stored | None:
    prefix, _, rest = name.partition(".")
    if any(one.startswith(f"{prefix}.") for one in tensors):
        return None
    longer = [one for one in tensors if one.partition(".")[2] == name]
    found = [rest] if rest in tensors else longer
    return Stored((found[0],), *tensors[found[0]]) if len(found) == 1 else None


_WAYS: tuple[Callable[[Tensors, BaseConfig, str], Stored | None], ...] = (
    _as_named,
    _fused,
    _router,
    _tied,
    _prefixed,
)
