"""Digests of a package and a key → `model.sig`."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lora_hub.signing import envelope, keys, policy, statement

if TYPE_CHECKING:
    from lora_hub.signing.keys import PrivateKey


def sign(files: Mapping[str, str], *, subject: str, key: "PrivateKey") -> bytes:
    """Return the bundle over the files; the same input gives the same bytes.

    Args:
        files: name → `sha256:…` of every file of the package but the signature itself.
        subject: what to call the package in the statement; it proves nothing.
        key: see `keys.private_key`.

    Raises:
        TrustError: the files are not those of a package, so nobody would accept it.
    """
    payload = statement.build(files, subject=subject)
    policy.check(statement.parse(payload), files, where=subject)
    return envelope.build(
        envelope.Envelope(
            payload=payload,
            signature=keys.sign(key, envelope.pae(payload)),
            hint=keys.hint(key),
        )
    )
