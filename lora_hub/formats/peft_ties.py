"""Weight tying in PEFT's LoRA: one change for the input embedding and the layer tied to it.

With `ensure_weight_tying`, PEFT gives the output embedding the factors of the input
embedding, exchanged and transposed, and saves both; whole embeddings it saves twice. Of
the factors one copy is enough, and PEFT loads it as well. Trained rows of the input
embedding it ties on its own wherever the base does.

Source: PEFT 0.21.2, `tuners/lora/model.py:_add_targets_to_tie`,
`utils/other.py:set_additional_trainable_modules`.
"""

from collections.abc import Iterable, Sequence

from lora_hub.errors import FormatError
from lora_hub.formats.peft_replaced import same
from lora_hub.formats.peft_tensors import EMBEDDINGS
from lora_hub.formats.source import Replacement, UpdateSource
from lora_hub.tensors.dtypes import BITS
from lora_hub.tensors.file import TensorFile
from lora_hub.tensors.header import TensorInfo


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
        if not embeddings or update.layer != "linear" or not _is_vocabulary(update.target):
            continue
        if not any(_is_over_again(update, other, tensors) for other in embeddings):
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
    return module.rpartition(".")[2] in EMBEDDINGS


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
