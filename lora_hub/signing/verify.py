"""A bundle, the digests found and the keys trusted → who signed, or why not.

The order matters: nothing in a bundle is believed before its signature is checked with a
key that came from elsewhere. A key inside the package counts for nothing.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lora_hub.errors import IntegrityError, TrustError
from lora_hub.signing import envelope, keys, policy, statement
from lora_hub.signing.statement import SIGNATURE_NAME


@dataclass(frozen=True, slots=True)
class Signer:
    """The trusted key that signed: its hint, its public PEM text."""

    hint: str
    public_pem: bytes

    @property
    def fingerprint(self) -> str:
        return f"SHA256:{self.hint}"


def verify(
    bundle: bytes | None,
    files: Mapping[str, str],
    public_keys: Sequence[bytes],
    *,
    where: str | None = None,
) -> Signer:
    """Return which of the keys signed exactly these files.

    Args:
        bundle: the bytes of `model.sig`, None where there is none.
        files: name → `sha256:…` of every file found but the signature itself.
        public_keys: PEM texts of the keys that may sign this.
        where: what to call the package in messages.

    Raises:
        TrustError: no signature, another key, a bad signature, or one that covers less
            than `policy.py` asks.
        IntegrityError: a file was changed, added or removed after signing.
    """
    at = _at(where, SIGNATURE_NAME)
    if bundle is None:
        raise TrustError(
            "the package is not signed, or its signature was removed",
            where=at,
            hint="ask its publisher for model.sig, or sign your own with `lorahub sign`",
        )
    parts = envelope.parse(bundle, where=at)
    signer = _signer(parts.hint, public_keys, at)
    public = keys.public_key(signer.public_pem)
    if not keys.is_signed(public, parts.signature, envelope.pae(parts.payload)):
        raise TrustError(
            f"the signature is not one by the key {signer.fingerprint} over this content",
            where=at,
            hint="the signature file was changed after signing, or is a forgery",
        )
    signed = statement.parse(parts.payload, where=at)
    policy.check(signed, files, where=at)
    _compare(signed.files, files, where)
    return signer


def _signer(hint: str, public_keys: Sequence[bytes], where: str) -> Signer:
    trusted: dict[str, bytes] = {}
    for pem in public_keys:
        own_hint, own_pem = _named(pem)
        trusted[own_hint] = own_pem
    if not trusted:
        raise TrustError(
            f"signed with the key SHA256:{hint}, and no key is trusted for this package",
            where=where,
            hint="trust its namespace first: `lorahub trust add`",
        )
    if hint not in trusted:
        expected = " or ".join(f"SHA256:{known}" for known in trusted)
        raise TrustError(
            f"signed with another key: SHA256:{hint}, expected {expected}",
            where=where,
            hint="compare the fingerprint with the one its publisher gives",
        )
    return Signer(hint, trusted[hint])


@functools.lru_cache(maxsize=256)
def _named(pem: bytes) -> tuple[str, bytes]:
    """Return the hint and the one spelling of a public key."""
    key = keys.public_key(pem)
    return keys.hint(key), keys.public_pem(key)


def _compare(
    signed: Mapping[str, str], found: Mapping[str, str], where: str | None
) -> None:
    for name in sorted(signed.keys() | found.keys()):
        at = _at(where, name)
        if name not in found:
            raise IntegrityError("the file was signed and is missing", where=at)
        if name not in signed:
            raise IntegrityError(
                "the file is not in the signature: it was added after signing", where=at
            )
        if signed[name] != found[name]:
            raise IntegrityError(
                f"the file was changed after signing: it has digest {found[name]}, the "
                f"signature says {signed[name]}",
                where=at,
            )


def _at(where: str | None, name: str) -> str:
    return f"{where}/{name}" if where else name
