"""SHA-256 digests, written `sha256:<64 hex>`, of bytes.

A digest names bytes; the identity of a base model is a fingerprint and lives in
`base/identity.py`.
"""

import hashlib
import re
from collections.abc import Iterable

from lora_hub.errors import InputError, IntegrityError

# Large enough that the interpreter's share of the time is below one percent, small
# enough to stay in the second-level cache.
CHUNK_BYTES = 1 << 20

_PATTERN = re.compile(r"sha256:[0-9a-f]{64}")


def of_bytes(data: bytes | bytearray | memoryview) -> str:
    """Return the digest of the bytes."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def of_chunks(chunks: Iterable[bytes | memoryview]) -> str:
    """Return the digest of the chunks taken one after another."""
    hasher = hashlib.sha256()
    for chunk in chunks:
        hasher.update(chunk)
    return "sha256:" + hasher.hexdigest()


def is_digest(text: str) -> bool:
    return _PATTERN.fullmatch(text) is not None


def hex_of(digest: str) -> str:
    """Return the 64 hexadecimal characters of a digest.

    Raises:
        InputError: the text is no `sha256:` digest.
    """
    if not is_digest(digest):
        raise InputError(
            f"{digest!r} is no digest",
            hint="a digest is written sha256: and 64 hexadecimal characters",
        )
    return digest.removeprefix("sha256:")


def check(data: bytes | bytearray | memoryview, expected: str, *, where: str) -> None:
    """Raise `IntegrityError` unless the bytes have the expected digest."""
    found = of_bytes(data)
    if found != expected:
        raise IntegrityError(
            f"the bytes have digest {found}, expected {expected}",
            where=where,
            hint="the file was changed or damaged after it was published",
        )
