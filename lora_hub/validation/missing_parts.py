"""Findings about what a PEFT config announces beside the factors and the file lacks, and
about whole weights that the file brings and the config does not announce.

PEFT itself passes over names that match nothing, and so do we where some match: lists are
copied from one model to the next. Nothing at all is worth a word.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from lora_hub.formats.source import AdapterSource
from lora_hub.validation.findings import Finding, finding


def check_missing_parts(
    config: Mapping[str, Any], source: AdapterSource, where: str
) -> Iterator[Finding]:
    """Give findings about a config that was read; {} gives none.

    Args:
        config: the object in `adapter_config.json`.
        source: what was read with it.
        where: the config, for messages.
    """
    roles = {replaced.role for replaced in source.replacements}
    saved = config.get("modules_to_save") or ()
    if isinstance(saved, (list, tuple)) and saved and roles.isdisjoint(_WHOLE):
        names = ", ".join(map(str, saved[:3]))
        yield finding(
            "LH064", where, f"modules_to_save names {names}, no tensor is of one of them"
        )
    bias = config.get("bias")
    beside = any(update.bias is not None for update in source.updates)
    if bias in ("all", "lora_only") and "bias" not in roles and not beside:
        yield finding("LH064", where, f"bias is {bias!r}, and no bias is in the weights")
    targets = {update.target for update in source.updates}
    for replaced in source.replacements:
        is_target = replaced.name.rpartition(".")[0] in targets
        if replaced.role == "embedding" and replaced.rows is None and not is_target:
            yield finding(
                "LH066",
                where,
                f"the weights bring a whole {replaced.name} "
                f"({'×'.join(map(str, replaced.tensor.shape))}), which replaces the base's",
            )


# A module that is saved whole may be an embedding, too.
_WHOLE = frozenset({"modules_to_save", "embedding"})
