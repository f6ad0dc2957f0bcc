"""The whole weights in a file of PEFT's LoRA: which of the base's they replace, and why.

A head that was trained whole (modules_to_save), biases (bias), the embeddings after a
resize, rows of an embedding (trainable_token_indices). A weight that nothing in the config
explains PEFT drops in silence; here it is refused.

Source: PEFT 0.21.2, `utils/other.py:_set_trainable` and `TrainableTokensWrapper`,
`tuners/tuners_utils.py:_get_learnable_bias_state_dict`, `utils/save_and_load.py`.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

from lora_hub.embeddings import INPUTS, VOCABULARY, last_part
from lora_hub.errors import FormatError
from lora_hub.formats.peft_targets import saved_names
from lora_hub.formats.peft_tensors import WRAPPED, Named
from lora_hub.formats.source import Replacement
from lora_hub.manifest.document import Role
from lora_hub.tensors.arrays import FLOATS
from lora_hub.tensors.file import TensorFile
from lora_hub.tensors.header import TensorInfo

# With bias "all", PEFT saves biases within modules saved whole twice more: as the module
# had them, which acts only while the adapter is off, and as they were trained.
_COPY = re.compile(r"(.+)\.(original_module|modules_to_save)\.(.+)")

# A vocabulary's rows beyond this are a mistake, and a manifest of them is too large.
_MAX_ROWS = 1 << 20


def read_replaced(
    config: Mapping[str, Any],
    named: Named,
    tensors: TensorFile,
    where: str,
    config_where: str,
) -> tuple[Replacement, ...]:
    """Return what the whole weights and the rows of a file replace, in order of names.

    Raises:
        FormatError: nothing explains one, two replace one tensor, or rows and their list
            disagree.
    """
    copies = {path for path in named.whole if _COPY.fullmatch(path)}
    targets = {module for module, _ in named.updates}
    saved = saved_names(config)
    found = [
        _whole(config, path, tensor, targets, _is_saved(named.keys[path], saved), where)
        for path, tensor in named.whole.items()
        if path not in copies
    ]
    found += _rows(config, named, where, config_where)
    by_name: dict[str, Replacement] = {}
    for each in found:
        if by_name.setdefault(each.name, each) is not each:
            raise FormatError(f"the weights replace {each.name} twice", where=where)
    for path in copies:
        _check_copy(path, named.whole[path], by_name, tensors, where)
    return tuple(by_name[name] for name in sorted(by_name))


def _check_copy(
    path: str,
    tensor: TensorInfo,
    by_name: Mapping[str, Replacement],
    tensors: TensorFile,
    where: str,
) -> None:
    match = _COPY.fullmatch(path)
    assert match is not None
    module, kind, rest = match.groups()
    # Within a module of several layers PEFT leaves the adapter's name in front.
    names = (f"{module}.{rest}", f"{module}.{rest.partition('.')[2]}")
    original = next((by_name[name] for name in names if name in by_name), None)
    is_trained = kind == "modules_to_save"
    if original is None:
        raise FormatError(
            f"the tensor {tensor.name!r} has {kind} in its name and is nobody's copy: PEFT "
            "would drop it in silence",
            where=where,
            hint="save the adapter with save_pretrained, which takes that out of the names",
        )
    if is_trained and not same(tensor, original.tensor, tensors):
        raise FormatError(
            f"the tensor {tensor.name!r} is not the same as the one it is a copy of",
            where=where,
            hint="save the adapter again with PEFT",
        )


def same(one: TensorInfo, other: TensorInfo, tensors: TensorFile) -> bool:
    """Return whether two tensors of a file are equal bit for bit."""
    kinds = (one.dtype, one.shape) == (other.dtype, other.shape)
    return kinds and tensors.read(one.name) == tensors.read(other.name)


# ── whole weights ────────────────────────────────────────────────────────────────────


def _whole(
    config: Mapping[str, Any],
    path: str,
    tensor: TensorInfo,
    targets: Collection[str],
    is_saved: bool,
    where: str,
) -> Replacement:
    # The bias of a layer of which rows are trained lies beneath their wrapper.
    path = re.sub(r"\.token_adapter\.base_layer\.bias$", ".bias", path)
    if ".token_adapter." in path:
        raise FormatError(
            f"the tensor {tensor.name!r} is a whole embedding of which rows are saved too",
            where=where,
            hint="save one of them: save_pretrained(..., save_embedding_layers=False)",
        )
    name, wrapped = _unwrapped(path, targets)
    module, _, last = name.rpartition(".")
    role: Role
    if not wrapped and is_saved:
        role = "modules_to_save"
    elif last == "bias" and _has_bias(config, module, targets):
        role = "bias"
    # The weight beneath a target PEFT puts into the base, whatever the layer.
    elif (last == "weight" and wrapped == module != "") or _is_embedding(module, last):
        role = "embedding"
    else:
        raise _unexplained(config, tensor, module, last, targets, where)
    if tensor.dtype not in FLOATS:
        raise FormatError(
            f"the tensor {tensor.name!r} is {tensor.dtype}, expected one of "
            f"{', '.join(sorted(FLOATS))}",
            where=where,
            hint="counts and other integers within a saved module are not read",
        )
    return Replacement(name, role, tensor)


def _unwrapped(path: str, targets: Collection[str]) -> tuple[str, str]:
    """Return the path in the base, and the target whose wrapper was in it or ""."""
    for end in (index for index in range(len(path)) if path.startswith(WRAPPED, index)):
        if path[:end] in targets:
            return path[:end] + path[end:].replace(WRAPPED, ""), path[:end]
    return path, ""


def _has_bias(config: Mapping[str, Any], module: str, targets: Collection[str]) -> bool:
    bias = config.get("bias")
    return bias == "all" or (bias == "lora_only" and module in targets)


def _is_embedding(module: str, last: str) -> bool:
    return last_part(module) in VOCABULARY and last in ("weight", "bias")


def _is_saved(key: str, names: tuple[str, ...]) -> bool:
    """Return whether modules_to_save means the tensor: by plain endings of a module's path.

    So "classifier" means pre_classifier too, as PEFT has it.
    """
    modules = [key[:end] for end in range(len(key)) if key[end] == "."]
    return any(module.endswith(names) for module in modules)


def _unexplained(
    config: Mapping[str, Any],
    tensor: TensorInfo,
    module: str,
    last: str,
    targets: Collection[str],
    where: str,
) -> FormatError:
    if last == "bias":
        whose = f"the bias of {'the target ' if module in targets else ''}{module}"
        return FormatError(
            f"the tensor {tensor.name!r} is {whose}, and the config's bias is "
            f"{config.get('bias') or 'none'!r}",
            where=where,
            hint="if it was trained, set bias to 'lora_only' (targets) or 'all'",
        )
    return FormatError(
        f"the tensor {tensor.name!r} is no low-rank factor but a whole weight, and "
        "modules_to_save names no module of it",
        where=where,
        hint="PEFT drops it in silence: name its module if it was trained, else remove it",
    )


# ── rows ─────────────────────────────────────────────────────────────────────────────


def _rows(
    config: Mapping[str, Any], named: Named, where: str, config_where: str
) -> list[Replacement]:
    said = config.get("trainable_token_indices")
    if isinstance(said, list) and len(named.rows) > 1:
        raise FormatError(
            f"trainable_token_indices is one list, and the weights hold rows of "
            f"{', '.join(sorted(named.rows))}",
            where=where,
        )
    if said and not named.rows:
        raise FormatError(
            "trainable_token_indices names tokens, and the weights hold no "
            "trainable_tokens_delta",
            where=where,
            hint="the file is incomplete, or belongs to another config",
        )
    found = [
        _rows_of(module, tensor, _tokens(said, named.keys[module], config_where), where)
        for module, tensor in sorted(named.rows.items())
    ]
    if isinstance(said, dict):
        _check_lists(said, [named.keys[module] for module in named.rows], where)
    return found


def _check_lists(said: Mapping[str, list[int]], keys: list[str], where: str) -> None:
    """Raise `FormatError` where a module is named whose rows are not there.

    Of an output layer tied to the embedding, with the same tokens, PEFT keeps none.
    """
    held = {name for name in said if any(key.endswith(name) for key in keys)}
    kept = [said[name] for name in held]
    for name, tokens in said.items():
        is_tied = last_part(name) not in INPUTS and tokens in kept
        if name not in held and not is_tied:
            raise FormatError(
                f"trainable_token_indices names tokens of {name!r}, and the weights hold "
                "no trainable_tokens_delta of it",
                where=where,
                hint="the file is incomplete, or belongs to another config",
            )


def _tokens(said: Any, key: str, where: str) -> list[int]:
    if isinstance(said, list):
        return said
    lists = [tokens for name, tokens in (said or {}).items() if key.endswith(name)]
    if not lists or any(tokens != lists[0] for tokens in lists):
        which = "several lists" if lists else "no list"
        raise FormatError(
            f"trainable_token_indices has {which} for {key}, whose rows the weights hold",
            where=where,
        )
    tokens: list[int] = lists[0]
    return tokens


def _rows_of(module: str, tensor: TensorInfo, tokens: list[int], where: str) -> Replacement:
    if len(tensor.shape) != 2 or 0 in tensor.shape or tensor.shape[0] != len(tokens):
        raise FormatError(
            f"{module}: the trained rows are {list(tensor.shape)}, and "
            f"trainable_token_indices names {len(tokens)} tokens",
            where=where,
        )
    if len(set(tokens)) != len(tokens):
        raise FormatError(
            f"{module}: trainable_token_indices names a token twice", where=where
        )
    if len(tokens) > _MAX_ROWS:
        raise FormatError(f"{module}: more than {_MAX_ROWS} rows were trained", where=where)
    if tensor.dtype not in FLOATS:
        raise FormatError(f"{module}: the trained rows are {tensor.dtype}", where=where)
    return Replacement(f"{module}.weight", "token_delta", tensor, tuple(tokens))
