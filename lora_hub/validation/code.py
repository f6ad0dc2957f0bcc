"""Findings about files that name Python code which loaders are to run.

transformers imports and runs what `auto_map` names once somebody passes
`trust_remote_code=True`. Nothing here runs it; an adapter has no use for it.
"""

from lora_hub import strict_json
from lora_hub.base.folder import TOKENIZER_CONFIG_NAME
from lora_hub.errors import DocumentError
from lora_hub.validation.findings import Finding, finding

# The file beside an adapter in which transformers looks for code.
CODE_NAME = TOKENIZER_CONFIG_NAME
MAX_BYTES = 16 << 20  # the largest known, with six thousand added tokens, has 1.2 MB


def check_code(data: bytes, where: str) -> list[Finding]:
    """Return a finding where the document names code, or cannot be read to tell.

    Other readers take documents that are refused here, so what hides behind a key given
    twice or a NaN would be run all the same.
    """
    try:
        value = strict_json.decode_object(data, where=where, max_bytes=MAX_BYTES)
    except DocumentError as error:
        return [finding("LH081", where, f"cannot be looked through: {error.problem}")]
    if value.get("auto_map"):
        return [finding("LH081", f"{where}#/auto_map", "auto_map names Python code")]
    return []
