"""`model.sig`: signed bytes, signature and key hint in one Sigstore bundle.

A DSSE envelope inside a Sigstore bundle v0.3, the form of OpenSSF Model Signing with a
key. Reading is strict: no key twice, none unknown, one signature, one spelling of every
base64 text, so that no byte of a bundle can change unnoticed.
Sources: DSSE protocol v1.0.2 (https://github.com/secure-systems-lab/dsse),
https://docs.sigstore.dev/about/bundle/.
"""

import base64
import binascii
import functools
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from lora_hub import canonical, strict_json
from lora_hub.errors import DocumentError, TrustError
from lora_hub.signing.statement import SIGNATURE_NAME

MAX_BUNDLE_BYTES = 1 << 20
IN_TOTO = "application/vnd.in-toto+json"

# What bundles of the other methods hold in place of a public key's hint.
_KEYLESS = ("certificate", "x509CertificateChain")


class _Part(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"
):
    pass


class _PublicKey(_Part, frozen=True, kw_only=True):
    hint: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")]


class _Material(_Part, frozen=True, kw_only=True):
    public_key: _PublicKey
    # model_signing 1.1.1 cannot read a bundle without this list; with a key it is empty.
    tlog_entries: Annotated[tuple[Any, ...], Meta(max_length=0)] = ()


class _Signature(_Part, frozen=True, kw_only=True):
    sig: str
    keyid: Literal[""] = ""  # not signed, so it may say nothing


class _Dsse(_Part, frozen=True, kw_only=True):
    payload: str
    payload_type: Literal["application/vnd.in-toto+json"]
    signatures: Annotated[tuple[_Signature, ...], Meta(min_length=1, max_length=1)]


class _Bundle(_Part, frozen=True, kw_only=True):
    media_type: Literal["application/vnd.dev.sigstore.bundle.v0.3+json"]
    verification_material: _Material
    dsse_envelope: _Dsse


@dataclass(frozen=True, slots=True)
class Envelope:
    """A bundle taken apart: nothing in it is verified yet.

    Attributes:
        payload: the bytes that were signed, see `statement.py`.
        signature: DER.
        hint: which key the bundle claims, see `keys.hint`.
    """

    payload: bytes
    signature: bytes
    hint: str


def pae(payload: bytes, *, payload_type: str = IN_TOTO) -> bytes:
    """Return the message that is signed: the payload bound to its type, unambiguously."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


def build(envelope: Envelope) -> bytes:
    """Return the canonical bytes of the bundle."""
    bundle = _Bundle(
        media_type="application/vnd.dev.sigstore.bundle.v0.3+json",
        verification_material=_Material(public_key=_PublicKey(hint=envelope.hint)),
        dsse_envelope=_Dsse(
            payload=base64.b64encode(envelope.payload).decode(),
            payload_type="application/vnd.in-toto+json",
            signatures=(_Signature(sig=base64.b64encode(envelope.signature).decode()),),
        ),
    )
    return canonical.encode(msgspec.to_builtins(bundle))


# Who checks a package asks twice in a row: what is covered, then who signed it.
@functools.lru_cache(maxsize=1)
def parse(bundle: bytes, *, where: str = SIGNATURE_NAME) -> Envelope:
    """Return the parts of a bundle made with a key.

    Raises:
        TrustError: not a bundle of that form, or above 1 MiB.
    """
    try:
        value = strict_json.decode_object(bundle, where=where, max_bytes=MAX_BUNDLE_BYTES)
        _refuse_keyless(value, where)
        document = msgspec.convert(value, _Bundle)
    except (DocumentError, msgspec.ValidationError) as error:
        problem = error.problem if isinstance(error, DocumentError) else str(error)
        raise TrustError(
            f"the signature cannot be read: {problem}",
            where=where,
            hint="the file was changed or damaged, or is no OpenSSF model signing bundle",
        ) from error
    return Envelope(
        payload=decode_base64(document.dsse_envelope.payload, where=where),
        signature=decode_base64(document.dsse_envelope.signatures[0].sig, where=where),
        hint=document.verification_material.public_key.hint,
    )


def decode_base64(text: str, *, where: str) -> bytes:
    """Return the bytes of a base64 text, which must be spelt the one canonical way.

    Raises:
        TrustError: it is not.
    """
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise TrustError(
            "the signature holds a text that is not base64", where=where
        ) from error
    # The last character carries bits that decoding drops: two spellings, one value.
    if base64.b64encode(data).decode() != text:
        raise TrustError("the signature holds base64 in a second spelling", where=where)
    return data


def _refuse_keyless(value: dict[str, Any], where: str) -> None:
    material = value.get("verificationMaterial")
    if isinstance(material, dict) and any(key in material for key in _KEYLESS):
        raise TrustError(
            "the package is signed with a certificate, expected a key",
            where=where,
            hint="sign it with `lorahub sign PKG --key FILE` or `model_signing sign key`",
        )
