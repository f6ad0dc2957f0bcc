"""Weight tying in PEFT's LoRA: one change for the input embedding and the layer tied to it.

With `ensure_weight_tying`, PEFT gives the output embedding the factors of the input
embedding, exchanged and transposed, and saves both; whole embeddings it saves twice. Of
the factors one copy is enough, and PEFT loads it as well. It does so only where the config
names one of the two as PEFT knows them (`ties`). Trained rows of the input embedding it
ties on its own wherever the base does.

Source: PEFT 0.21.2, `tuners/lora/model.py:_add_targets_to_tie`,
`tuners/tuners_utils.py:_check_tied_modules`,
`utils/other.py:set_additional_trainable_modules`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lora_hub.embeddings import VOCABULARY, last_part
from lora_hub.errors import FormatError
from lora_hub.formats.patterns import Budget
from lora_hub.formats.peft_replaced import same
from lora_hub.formats.peft_targets import module_matcher
from lora_hub.formats.source import Replacement, UpdateSource
from lora_hub.tensors.dtypes import BITS
from lora_hub.tensors.file import TensorFile
from lora_hub.tensors.header import TensorInfo

# PEFT's EMBEDDING_LAYER_NAMES: it ties modules of these names and no others.
TIED_NAMES = ("embed_tokens", "lm_head")


def ties(config: Mapping[str, Any], where: str, budget: Budget | None = None) -> bool:
    """Return whether PEFT ties what the config asks it to tie.

    The flag does nothing, whatever the base is, where neither `modules_to_save` nor a list
    of `target_modules` has one of `TIED_NAMES` as last part of a name, nor an expression in
    its place matches one of them without its path.

    Args:
        config: checked by `check_config`.
        where: its path, for messages.
        budget: as for `peft_targets.expand`.
    """
    if not config.get("ensure_weight_tying"):
        return False
    targets = config.get("target_modules") or ()
    if isinstance(targets, str):
        if any(map(module_matcher(config, where, budget), TIED_NAMES)):
            return True
        targets = ()
    named = (*targets, *(config.get("modules_to_save") or ()))
    return any(last_part(name) in TIED_NAMES for name in named)


def is_held(updates: Iterable[UpdateSource], replaced: Iterable[Replacement]) -> bool:
    """Return whether a file holds what PEFT would tie: else nothing is to be tied."""
    modules = [update.target for update in updates]
    modules += [
        each.name.rpartition(".")[0]
        for each in replaced
        if each.rows is None and each.role == "modules_to_save"
    ]
    return any(last_part(module) in TIED_NAMES for module in modules)


def tied_targets(
    updates: Sequence[UpdateSource], tensors: TensorFile, where: str
) -> frozenset[str]:
    """Return the targets whose update is the input embedding's over again.

    For adapters with `ensure_weight_tying`.

    Raises:
        FormatError: the update of an output embedding is another one.
    """
    embeddings = [update for update in updates if update.layer == "embedding"]
    found = set()
    for update in updates:
        if not embeddings or update.layer != "linear":
            continue
        if not any(_is_over_again(update, other, tensors) for other in embeddings):
            if not _is_vocabulary(update.target):
                continue
            raise FormatError(
                f"ensure_weight_tying is true, and the update of {update.target} is not "
                f"that of {embeddings[0].target} transposed",
                where=where,
                hint="set ensure_weight_tying to false if two updates are meant",
            )
        if update.magnitude is not None:
            raise FormatError(
                f"{update.target}: DoRA of tied embeddings, which scales the one weight in "
                "two unlike ways",
                where=where,
                hint="train it without DoRA, or without ensure_weight_tying",
            )
        found.add(update.target)
    return frozenset(found)


def check_replaced(
    replacements: Iterable[Replacement], tensors: TensorFile, where: str
) -> None:
    """Raise `FormatError` unless all whole embeddings are equal bit for bit."""
    whole = [
        each
        for each in replacements
        if each.rows is None and each.name.endswith(".weight") and is_embedding(each)
    ]
    for each in whole[1:]:
        if not same(each.tensor, whole[0].tensor, tensors):
            raise FormatError(
                f"ensure_weight_tying is true, and {each.name} is not {whole[0].name}",
                where=where,
                hint="set ensure_weight_tying to false if two weights are meant",
            )


def is_embedding(replacement: Replacement) -> bool:
    """Return whether a tensor of an input or output embedding is replaced, by its name."""
    return _is_vocabulary(replacement.name.rpartition(".")[0])


def _is_vocabulary(module: str) -> bool:
    return last_part(module) in VOCABULARY


def _is_over_again(
    update: UpdateSource, embedding: UpdateSource, tensors: TensorFile
) -> bool:
    return (
        update.scaling == embedding.scaling
        and _is_transposed(update.a, embedding.b, tensors)
        and _is_transposed(update.b, embedding.a, tensors)
    )


def _is_transposed(one: TensorInfo, other: TensorInfo, tensors: TensorFile) -> bool:
    import numpy as np

    if (one.dtype, one.shape) != (other.dtype, other.shape[::-1]):
        return False
    first, second = (
        np.frombuffer(tensors.read(each.name), dtype=f"<u{BITS[each.dtype] // 8}")
        for each in (one, other)
    )
    return bool((first.reshape(one.shape) == second.reshape(other.shape).T).all())
