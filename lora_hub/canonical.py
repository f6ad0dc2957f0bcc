"""A JSON value as canonical bytes: one value, one spelling (RFC 8785).

Digests and signatures are over bytes, so every document of ours has one byte form.
Reading is the matter of `strict_json.py`.
"""

from typing import Any

from lora_hub.errors import DocumentError


def encode(value: Any) -> bytes:
    """Return the RFC 8785 form of a value made of dict, list, str, int, float, bool, None.

    Raises:
        DocumentError: the value holds NaN, an infinity, or an integer beyond 2**53,
            which JSON numbers cannot carry exactly.
    """
    import rfc8785

    try:
        return rfc8785.dumps(value)
    except rfc8785.CanonicalizationError as error:
        raise DocumentError(f"the value has no canonical JSON form: {error}") from error
