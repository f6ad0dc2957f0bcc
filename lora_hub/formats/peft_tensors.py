"""The names in an `adapter_model.safetensors` of PEFT's LoRA, both ways.

    base_model.model.<module>.lora_A.weight             lora_B.weight, lora_B.bias
    base_model.model.<module>.lora_embedding_A          lora_embedding_B
    base_model.model.<module>.lora_magnitude_vector     older files: ….weight behind it
    base_model.model.<module>.token_adapter.trainable_tokens_delta
    base_model.model.<path of a tensor of the base>     a whole weight

Where PEFT has wrapped a module, `.base_layer` stands behind its path in the names of what
lies within. What the whole weights are for is the matter of `peft_replaced.py`.

Source: PEFT 0.21.2, `utils/save_and_load.py`, `tuners/tuners_utils.py`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from lora_hub.errors import FormatError
from lora_hub.formats.source import UpdateSource
from lora_hub.tensors.header import TensorInfo

WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."
WRAPPED = ".base_layer"
ROWS = ".token_adapter.trainable_tokens_delta"

# What stands behind a module's path → which part of its update that is.
_PARTS = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_B.bias": "bias",
    ".lora_embedding_A": "a",
    ".lora_embedding_B": "b",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
}

# As a model calls its factors in memory, with the adapter's name in them, which
# `save_pretrained` takes out. PEFT does not find them so.
_WITH_NAME = re.compile(
    r".+\.lora_(?:[AB]|embedding_[AB]|magnitude_vector)\.(?P<name>[^.]+)(?:\.(?:weight|bias))?"
)

# What stands in names of other methods that call themselves LoRA.
_OTHERS = {".lora_diag": "a diagonal of KaSA"}


@dataclass(slots=True)
class Parts:
    """The tensors of one update, as far as they were found.

    Attributes:
        key: the module's path as PEFT's rules see it.
        depth: how many wrappers lie around this one; above zero for parameters only.
    """

    key: str
    depth: int
    tensors: dict[str, TensorInfo] = field(default_factory=dict)

    @property
    def is_embedding(self) -> bool:
        """Whether the factors are named as an embedding's."""
        return _is_embeddings(self.tensors["a"])


@dataclass(frozen=True, slots=True)
class Named:
    """All tensors of a file, by what their names say.

    Attributes:
        updates: (path of the module, depth) → its tensors.
        rows: path of the module → the rows that replace some of its own.
        whole: path of a tensor, as the file spells it behind the prefix → the tensor.
        keys: path of a module → the path as PEFT's rules see it.
    """

    updates: dict[tuple[str, int], Parts]
    rows: dict[str, TensorInfo]
    whole: dict[str, TensorInfo]
    keys: dict[str, str]


def sort_out(tensors: Mapping[str, TensorInfo], where: str) -> Named:
    """Return what the names say; every tensor is in exactly one place.

    Raises:
        FormatError: a name is not PEFT's, two tensors mean one thing, or a factor is
            missing.
    """
    named = Named({}, {}, {}, {})
    for name, tensor in tensors.items():
        key, suffix = _split(name, where)
        if suffix in _PARTS:
            _add_part(named, key, suffix, tensor, where)
            continue
        place = named.rows if suffix else named.whole
        path = without_prefix(key)
        if place.setdefault(path, tensor) is not tensor:
            raise FormatError(f"two tensors are {path}", where=where)
        named.keys.setdefault(path, key)
    if not tensors:
        raise FormatError("the file holds no tensors", where=where)
    _check_names(named.whole, where)
    if not named.updates:
        raise FormatError("the file holds no low-rank factor", where=where)
    for (target, _), parts in named.updates.items():
        _check_complete(target, parts, where)
    return named


def _check_names(whole: Mapping[str, TensorInfo], where: str) -> None:
    """Raise `FormatError` where a factor bears the adapter's name."""
    for path, tensor in whole.items():
        match = _WITH_NAME.fullmatch(path)
        if match:
            raise FormatError(
                f"the tensor {tensor.name!r} has the adapter's name {match['name']!r} in "
                "it, and PEFT would drop it in silence",
                where=where,
                hint="save the adapter with save_pretrained, or take the name out of the "
                "tensors' names",
            )


def _add_part(named: Named, key: str, suffix: str, tensor: TensorInfo, where: str) -> None:
    core, depth = _unwrapped(key)
    target, part = without_prefix(core), _PARTS[suffix]
    if WRAPPED in target:
        raise FormatError(
            f"the tensor {tensor.name!r} lies inside another target, as in PEFT's layer "
            "for nn.MultiheadAttention, which is not read",
            where=where,
            hint="merge it into its base with PEFT",
        )
    parts = named.updates.get((target, depth))
    if parts is None:
        parts = named.updates[target, depth] = Parts(core, depth)
    if part in parts.tensors or parts.key != core:
        what = "factors" if part in ("a", "b") else f"the {part}"
        raise FormatError(f"two tensors are {what} of {target}", where=where)
    parts.tensors[part] = tensor
    named.keys.setdefault(target, core)


def _check_complete(target: str, parts: Parts, where: str) -> None:
    a, b = parts.tensors.get("a"), parts.tensors.get("b")
    if a is None or b is None:
        factor = "a" if a is None else "b"
        other = "factor" if a or b else "tensors"
        raise FormatError(
            f"{target} has no lora_{factor.upper()} beside its other {other}",
            where=where,
            hint="both factors are needed; the file is incomplete",
        )
    if _is_embeddings(a) != _is_embeddings(b):
        raise FormatError(
            f"{target} has one factor of an embedding and one of another layer", where=where
        )


def _is_embeddings(factor: TensorInfo) -> bool:
    return ".lora_embedding_" in factor.name


def _split(name: str, where: str) -> tuple[str, str]:
    """Return a module's path and what stands behind it; "" for a whole weight."""
    for middle, meaning in _OTHERS.items():
        if middle in name:
            raise FormatError(
                f"the tensor {name!r} is {meaning}, which is not read", where=where
            )
    if not name.startswith(PREFIX):
        raise FormatError(
            f"the tensor {name!r} is not named as PEFT does ({PREFIX}….lora_A.weight)",
            where=where,
            hint="PEFT drops it in silence: save the adapter with save_pretrained, or put "
            f"{PREFIX} in front if the path is the base's",
        )
    path = name.removeprefix(PREFIX)
    start = path.rfind(".lora_")  # every suffix of `_PARTS` begins so
    if start > 0 and path[start:] in _PARTS:
        return path[:start], path[start:]
    if path.endswith(ROWS) and path != ROWS:
        return path.removesuffix(ROWS), ROWS
    return path, ""


def _unwrapped(key: str) -> tuple[str, int]:
    depth = 0
    while key.endswith(WRAPPED):
        key = key.removesuffix(WRAPPED)
        depth += 1
    return key, depth


def without_prefix(key: str) -> str:
    """Return the path in the base that a name in the file begins with."""
    # An adapter trained on top of a PeftModel carries the prefix once more.
    while key.startswith(PREFIX):
        key = key.removeprefix(PREFIX)
    return key


def update_names(update: UpdateSource, path: str) -> dict[str, TensorInfo]:
    """Return name → tensor of one update.

    Args:
        update: any of PEFT's.
        path: of its module with what wraps it, `….experts.base_layer` for a parameter.
    """
    kind = "lora_embedding_{}" if update.layer == "embedding" else "lora_{}.weight"
    names = {
        f"{PREFIX}{path}.{kind.format('A')}": update.a,
        f"{PREFIX}{path}.{kind.format('B')}": update.b,
    }
    if update.magnitude is not None:
        names[f"{PREFIX}{path}.lora_magnitude_vector"] = update.magnitude
    if update.bias is not None:
        names[f"{PREFIX}{path}.lora_B.bias"] = update.bias
    return names
