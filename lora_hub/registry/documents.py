"""The files of a registry as types. Their bytes are canonical JSON.

Events repeat facets of the manifest, so that search needs no other file; `check.py` proves
them equal.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from lora_hub import canonical, strict_json
from lora_hub.errors import DocumentError
from lora_hub.manifest.codec import typed
from lora_hub.manifest.document import (
    Count,
    Document,
    FullName,
    Line,
    NonEmpty,
    Rank,
    Sha256,
    Timestamp,
    Version,
    spelt,
)

CONFIG = "config.json"
MAX_EVENT_BYTES = 1 << 20

Hint = Annotated[str, spelt("[0-9a-f]{64}", "see signing/keys.py")]
Part = Annotated[str, spelt("[a-z0-9][a-z0-9-]{0,61}[a-z0-9]")]
Pem = Annotated[str, Meta(min_length=1, max_length=2000, description="a public key")]


class RegistryConfig(Document, frozen=True, kw_only=True):
    """`config.json`: what makes a folder a registry."""

    schema: Literal["lorahub.registry/1"]
    name: Part


class BaseFacet(Document, frozen=True, kw_only=True):
    root: Sha256
    struct: Sha256


class _Event(Document, frozen=True, kw_only=True, tag_field="event"):
    v: Literal[1]
    seq: Rank
    prev: Sha256 | None = None  # digest of the file before this one
    ts: Timestamp  # claimed by the writer, proven by nothing


class PublishEvent(_Event, frozen=True, kw_only=True, tag="publish"):
    """A version appears. What it says is proven by the package's own signature."""

    name: FullName
    version: Version
    package: Sha256  # of the manifest, which names every other file
    signature: Sha256  # of model.sig
    size_bytes: Count  # of all files together
    summary: Line
    base: BaseFacet
    max_rank: Rank
    target_names: tuple[NonEmpty, ...]
    task: NonEmpty
    license: NonEmpty


class YankEvent(_Event, frozen=True, kw_only=True, tag="yank"):
    """A version is withdrawn: ranges pass over it, who names it still gets it."""

    name: FullName
    version: Version
    reason: NonEmpty
    signer: Hint
    auth: str  # see authority.py


class UnyankEvent(_Event, frozen=True, kw_only=True, tag="unyank"):
    """A withdrawn version is back."""

    name: FullName
    version: Version
    signer: Hint
    auth: str


class KeyEvent(_Event, frozen=True, kw_only=True, tag="keys"):
    """From here on these keys, and no others, sign for the namespace.

    The first event claims the namespace; each later one is signed with a key of the one
    before it.
    """

    namespace: Part
    keys: Annotated[tuple[Pem, ...], Meta(min_length=1, max_length=32)]
    signer: Hint | None = None
    auth: str | None = None


Event = PublishEvent | YankEvent | UnyankEvent


def encode(document: msgspec.Struct) -> bytes:
    """Return the canonical bytes of a document.

    Raises:
        DocumentError: a field is not as its type says, or the document is too large.
    """
    kind = type(document)
    data = canonical.encode(msgspec.to_builtins(document))
    # Read it back: what we write is never what we would refuse.
    decode(data, kind, where=kind.__name__)
    return data


def decode(data: bytes, kind: Any, *, where: str) -> Any:
    """Return the document of that kind in the bytes.

    Raises:
        DocumentError: not canonical JSON, or not of the kind's shape.
    """
    value = strict_json.decode_object(data, where=where, max_bytes=MAX_EVENT_BYTES)
    if canonical.encode(value, where=where) != data:
        raise DocumentError("the document is not in canonical form (RFC 8785)", where=where)
    return typed(value, kind, where=where)
