"""The bytes that are signed: an in-toto statement listing every file with its digest.

Only this form is written and read: method `files`, hash `sha256`, no symbolic links, one
subject. Its layout is that of OpenSSF Model Signing v1.0; keys beyond it are refused, as
the specification's schema refuses them.
Source: spec/v1.0.md section 6 of https://github.com/ossf/model-signing-spec.
"""

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from lora_hub import canonical, digest, strict_json
from lora_hub.errors import DocumentError, TrustError

SIGNATURE_NAME = "model.sig"
MAX_RESOURCES = 256

_Hex = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")]
_Name = Annotated[str, Meta(min_length=1, max_length=120)]


class _Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class _Digest(_Part, frozen=True, kw_only=True):
    sha256: _Hex


class _Subject(_Part, frozen=True, kw_only=True):
    name: str
    digest: _Digest


class _Resource(_Part, frozen=True, kw_only=True):
    name: _Name
    algorithm: Literal["sha256"]
    digest: _Hex


class _Serialization(_Part, frozen=True, kw_only=True):
    method: Literal["files"]
    hash_type: Literal["sha256"]
    allow_symlinks: bool
    ignore_paths: tuple[str, ...] = ()


class _Predicate(_Part, frozen=True, kw_only=True):
    serialization: _Serialization
    resources: Annotated[tuple[_Resource, ...], Meta(max_length=MAX_RESOURCES)]


class _Document(_Part, frozen=True, kw_only=True):
    type: Literal["https://in-toto.io/Statement/v1"] = msgspec.field(name="_type")
    subject: Annotated[tuple[_Subject, ...], Meta(min_length=1, max_length=1)]
    predicate_type: Literal["https://model_signing/signature/v1.0"] = msgspec.field(
        name="predicateType"
    )
    predicate: _Predicate


@dataclass(frozen=True, slots=True)
class Statement:
    """What a signer says: these files have these digests.

    Attributes:
        subject: what the signer called the directory; it proves nothing.
        files: name → `sha256:…`, every file the signature covers.
        ignored: paths the signature does not cover, whatever lies there.
        allow_symlinks: whether the signer followed symbolic links.
    """

    subject: str
    files: Mapping[str, str]
    ignored: tuple[str, ...]
    allow_symlinks: bool


def build(files: Mapping[str, str], *, subject: str) -> bytes:
    """Return the canonical bytes of the statement over `name → sha256:…`."""
    # Code-point order; flat names sort the same way as model_signing's path order.
    digests = {name: digest.hex_of(files[name]) for name in sorted(files)}
    document = _Document(
        type="https://in-toto.io/Statement/v1",
        subject=(_Subject(name=subject, digest=_Digest(sha256=_root(digests))),),
        predicate_type="https://model_signing/signature/v1.0",
        predicate=_Predicate(
            serialization=_Serialization(
                method="files",
                hash_type="sha256",
                allow_symlinks=False,
                ignore_paths=(SIGNATURE_NAME,),
            ),
            resources=tuple(
                _Resource(name=name, algorithm="sha256", digest=value)
                for name, value in digests.items()
            ),
        ),
    )
    return canonical.encode(msgspec.to_builtins(document))


# Who checks a package asks twice in a row: what is covered, then who signed it.
@functools.lru_cache(maxsize=1)
def parse(payload: bytes, *, where: str = SIGNATURE_NAME) -> Statement:
    """Return the statement in the bytes.

    Raises:
        TrustError: not a statement of the form above, a file listed twice, or a root
            digest that is not that of the list.
    """
    try:
        value = strict_json.decode_object(payload, where=where)
        document = msgspec.convert(value, _Document)
    except (DocumentError, msgspec.ValidationError) as error:
        problem = error.problem if isinstance(error, DocumentError) else str(error)
        raise TrustError(
            f"what was signed is no OpenSSF model signing statement: {problem}", where=where
        ) from error
    resources = document.predicate.resources
    digests = {resource.name: resource.digest for resource in resources}
    if len(digests) != len(resources):
        raise TrustError("the signature lists a file twice", where=where)
    if document.subject[0].digest.sha256 != _root(digests):
        raise TrustError(
            "the signature's root digest is not that of the files it lists", where=where
        )
    return Statement(
        subject=document.subject[0].name,
        files={name: f"sha256:{value}" for name, value in digests.items()},
        ignored=document.predicate.serialization.ignore_paths,
        allow_symlinks=document.predicate.serialization.allow_symlinks,
    )


def _root(digests: Mapping[str, str]) -> str:
    # Section 6.5.1: over the raw digests in list order. It holds no names, so two packages
    # whose files are swapped share it: never an identity.
    return hashlib.sha256(
        b"".join(bytes.fromhex(value) for value in digests.values())
    ).hexdigest()
