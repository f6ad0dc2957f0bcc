"""Elliptic-curve keys as PEM text: make, read, name, use.

The only file that touches `cryptography`. New keys are on P-256; P-384 and P-521 are
read too, as OpenSSF Model Signing allows these three and no others (Ed25519 is not
among them).
"""

import functools
import hashlib
from typing import TYPE_CHECKING, TypeAlias

from lora_hub.errors import InputError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.hashes import HashAlgorithm

    PrivateKey: TypeAlias = ec.EllipticCurvePrivateKey
    PublicKey: TypeAlias = ec.EllipticCurvePublicKey

# Curve → its hash, as the specification's algorithm registry pairs them.
CURVES = {"secp256r1": "SHA256", "secp384r1": "SHA384", "secp521r1": "SHA512"}

_HINT = "make a pair with `lorahub keygen`"


def generate() -> bytes:
    """Return a new P-256 private key as unencrypted PKCS 8 PEM."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    return ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def private_key(pem: bytes, *, where: str = "private key") -> "PrivateKey":
    """Return the private key in the PEM text (PKCS 8 or SEC 1, no password).

    Raises:
        InputError: no such text, a password is asked for, or another kind of key.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        key = serialization.load_pem_private_key(pem, None)
    except TypeError as error:
        raise InputError(
            "the private key is encrypted with a password, which is not supported",
            where=where,
            hint="decrypt it to a file of mode 0600: openssl pkcs8 -in KEY -out PLAIN",
        ) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise InputError("no private key in PEM text", where=where, hint=_HINT) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise InputError(_other_kind(type(key).__name__), where=where, hint=_HINT)
    _check_curve(key.curve.name, where)
    return key


# Whoever looks at many packages meets the same few keys.
@functools.lru_cache(maxsize=256)
def public_key(pem: bytes, *, where: str = "public key") -> "PublicKey":
    """Return the public key in the PEM text (SubjectPublicKeyInfo).

    Raises:
        InputError: no such text, or another kind of key.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    if b"PRIVATE KEY-----" in pem:
        raise InputError(
            "this is a private key, expected its public half",
            where=where,
            hint="openssl pkey -in KEY -pubout -out KEY.pub",
        )
    try:
        key = serialization.load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise InputError("no public key in PEM text", where=where, hint=_HINT) from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise InputError(_other_kind(type(key).__name__), where=where, hint=_HINT)
    _check_curve(key.curve.name, where)
    return key


def public_pem(key: "PrivateKey | PublicKey") -> bytes:
    """Return the public half as SubjectPublicKeyInfo PEM; one key has one such text."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    public = key.public_key() if isinstance(key, ec.EllipticCurvePrivateKey) else key
    return public.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def hint(key: "PrivateKey | PublicKey") -> str:
    """Return what a bundle calls the key: hex SHA-256 of its public PEM text."""
    return hashlib.sha256(public_pem(key)).hexdigest()


def fingerprint(key: "PrivateKey | PublicKey") -> str:
    """Return the key's name for people: what `sha256sum KEY.pub` prints, behind SHA256:."""
    return f"SHA256:{hint(key)}"


def sign(key: "PrivateKey", message: bytes) -> bytes:
    """Return the DER signature; the same key and message give the same bytes (RFC 6979)."""
    from cryptography.hazmat.primitives.asymmetric import ec

    algorithm = ec.ECDSA(_hash_of(key.curve.name), deterministic_signing=True)
    return key.sign(message, algorithm)


def is_signed(key: "PublicKey", signature: bytes, message: bytes) -> bool:
    """Return whether the DER signature is one of the message by this key."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        key.verify(signature, message, ec.ECDSA(_hash_of(key.curve.name)))
    except InvalidSignature:
        return False
    return True


def _hash_of(curve: str) -> "HashAlgorithm":
    from cryptography.hazmat.primitives import hashes

    algorithm: HashAlgorithm = getattr(hashes, CURVES[curve])()
    return algorithm


def _check_curve(curve: str, where: str) -> None:
    if curve not in CURVES:
        raise InputError(
            f"the key is on the curve {curve}, expected one of {', '.join(CURVES)}",
            where=where,
            hint=_HINT,
        )


def _other_kind(kind: str) -> str:
    return (
        f"the key is of the kind {kind}, expected an elliptic-curve key: OpenSSF Model "
        "Signing knows P-256, P-384 and P-521"
    )
