"""Manifest bytes ↔ `Manifest`.

Reading is strict about form and generous about the future: an unknown major version is
refused by name; fields this version does not know are kept in the bytes (which are never
written anew) and reported by `unknown_fields`.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, get_args

import msgspec

from lora_hub import canonical, plain_json, strict_json
from lora_hub.errors import DocumentError
from lora_hub.manifest.document import (
    MANIFEST_VERSION,
    MAX_MANIFEST_BYTES,
    AdapterInfo,
    Base,
    Document,
    Manifest,
)
from lora_hub.recent import MAX_KEY_BYTES, Recent

T = TypeVar("T")

KNOWN_MAJOR, KNOWN_MINOR = (int(part) for part in MANIFEST_VERSION.split("."))


def encode(manifest: Manifest) -> bytes:
    """Return the canonical bytes of the manifest; their digest is the package digest."""
    return canonical.encode(msgspec.to_builtins(manifest))


def decode(data: bytes, *, where: str = "lorahub.json") -> Manifest:
    """Return the manifest in the bytes.

    Raises:
        DocumentError: not canonical JSON, of an unknown major version, or not of the
            manifest's shape; `where` ends in the JSON pointer.
    """
    parsed = parse(data, where=where)
    if not parsed.is_canonical:
        raise DocumentError(
            "the manifest is not in canonical form (RFC 8785)",
            where=where,
            hint="it was edited by hand after packing; change the source and pack again",
        )
    return manifest_of(parsed, where=where)


@dataclass(frozen=True, slots=True)
class Parsed:
    """The object that a manifest's bytes spell.

    Attributes:
        is_canonical: whether they spell it as RFC 8785 asks.
        known: those of its members that are documents already, without unknown fields.
    """

    value: dict[str, Any]
    is_canonical: bool
    known: Mapping[str, Document] = field(default_factory=dict)

    @property
    def rest(self) -> dict[str, Any]:
        """The members that are not known."""
        return {name: item for name, item in self.value.items() if name not in self.known}


def parse(data: bytes, *, where: str) -> Parsed:
    """Return the object that a manifest's bytes spell.

    Raises:
        DocumentError: not JSON, no object, or of an unknown major version.
    """
    if len(data) <= MAX_MANIFEST_BYTES:
        parsed = _known_parsed(data) or _plainly_parsed(data)
        if parsed is not None:
            check_version(parsed.value, where)
            return parsed
    value = strict_json.decode_object(data, where=where, max_bytes=MAX_MANIFEST_BYTES)
    check_version(value, where)
    return Parsed(value, canonical.encode(value, where=where) == data)


def manifest_of(parsed: Parsed, *, where: str) -> Manifest:
    """Return what was parsed as a manifest; errors as `typed`."""
    return typed({**parsed.value, **parsed.known}, Manifest, where=where)


# What a manifest says of its adapter and its base comes first in canonical form, and is
# most of it: the bytes before the next member → their values, and the documents they are.
_BEGINNINGS: Recent[tuple[dict[str, Any], dict[str, Document]]] = Recent()
_NEXT_NAME = "created"
_NEXT = b',"created":'


def _known_parsed(data: bytes) -> Parsed | None:
    """Return a manifest that is plainly canonical and begins as another one did."""
    end = data.find(_NEXT)
    beginning = _BEGINNINGS.get(data[:end]) if 0 <= end <= MAX_KEY_BYTES else None
    if beginning is None:
        return None
    # In canonical form the members behind `created` are none of those before it.
    rest = plain_json.decode_canonical(b"{" + data[end + 1 :])
    if not isinstance(rest, dict):
        return None
    values, documents = beginning
    return Parsed({**values, **rest}, is_canonical=True, known=documents)


def _plainly_parsed(data: bytes) -> Parsed | None:
    value = plain_json.decode_canonical(data)
    if not isinstance(value, dict):
        return None
    values = {name: item for name, item in value.items() if name < _NEXT_NAME}
    end = data.find(_NEXT)
    # A quote within a text would be escaped: what is spelt so once is the member's name.
    is_end = 0 <= end <= MAX_KEY_BYTES and data.count(_NEXT[1:]) == 1
    if not is_end or _NEXT_NAME not in value or not values.keys() <= _FIRST.keys():
        return Parsed(value, is_canonical=True)
    try:
        documents = {name: msgspec.convert(values[name], _FIRST[name]) for name in values}
    except msgspec.ValidationError:
        return Parsed(value, is_canonical=True)
    if any(_has_unknown(values[name], _FIRST[name]) for name in values):
        return Parsed(value, is_canonical=True)
    _BEGINNINGS.keep(data[:end], (values, documents))
    return Parsed(value, is_canonical=True, known=documents)


_FIRST: Mapping[str, type[Document]] = {"adapter": AdapterInfo, "base": Base}


def typed(value: Any, kind: type[T], *, where: str) -> T:
    """Return a JSON value as the document it is meant to be.

    Raises:
        DocumentError: it has another shape; `where` ends in the JSON pointer.
    """
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        problem, _, path = str(error).partition(" - at `")
        raise DocumentError(
            problem[:1].lower() + problem[1:], where=f"{where}{pointer(path.rstrip('`'))}"
        ) from error


def unknown_fields(
    value: Any, of: type[Document] = Manifest, at: str = ""
) -> tuple[str, ...]:
    """Return the JSON pointers of fields that this version of the manifest does not have.

    `x-…` at the top and everything under `ext` belong to tools and are left out.
    """
    if not _has_unknown(value, of):
        return ()
    found: list[str] = []
    known = _documents_in_fields(of)
    for key, item in value.items() if isinstance(value, dict) else ():
        if key not in known:
            if at or not key.startswith("x-"):
                found.append(f"{at}/{key}")
            continue
        for kind in known[key]:
            if isinstance(item, (list, tuple)):
                for index, one in enumerate(item):
                    found += unknown_fields(one, kind, f"{at}/{key}/{index}")
            else:
                found += unknown_fields(item, kind, f"{at}/{key}")
    return tuple(found)


def _has_unknown(value: Any, of: type[Document]) -> bool:
    """Return whether there may be fields to tell of: mostly not, and that is told fast."""
    if not isinstance(value, dict):
        return False
    names, nested = _names(of)
    if not value.keys() <= names:
        return True
    for key, kind in nested:
        if key not in value:
            continue
        items = value[key]
        if not isinstance(items, list):
            items = (items,)
        own_names, own_nested = _names(kind)
        for item in items:
            if own_nested or not isinstance(item, dict):
                if _has_unknown(item, kind):
                    return True
            elif not item.keys() <= own_names:
                return True
    return False


@functools.cache
def _names(
    of: type[Document],
) -> tuple[frozenset[str], tuple[tuple[str, type[Document]], ...]]:
    """Return the fields of a document, and those whose values are documents, or lists."""
    known = _documents_in_fields(of)
    return frozenset(known), tuple(
        (key, kind) for key, kinds in known.items() for kind in kinds
    )


@functools.cache
def _documents_in_fields(of: type[Document]) -> dict[str, tuple[type[Document], ...]]:
    """Return field → the documents that its value is, or is a list of."""

    def documents(kind: Any) -> tuple[type[Document], ...]:
        if isinstance(kind, type) and issubclass(kind, Document):
            return (kind,)
        return tuple(found for inner in get_args(kind) for found in documents(inner))

    return {
        field.encode_name: documents(field.type) for field in msgspec.structs.fields(of)
    }


def is_newer(manifest: Manifest) -> bool:
    """Return whether the manifest was written by a newer minor version than this one."""
    return int(manifest.manifest_version.partition(".")[2]) > KNOWN_MINOR


def pointer(path: str) -> str:
    """Return the JSON pointer of a msgspec path: `$.files[2].size` → `#/files/2/size`."""
    text = path.removeprefix("$").replace("[", "/").replace("]", "").replace(".", "/")
    return f"#{text}" if text else ""


def check_version(value: dict[str, Any], where: str) -> None:
    """Raise `DocumentError` unless the document says that it is a manifest we can read."""
    version = value.get("manifest_version")
    if not isinstance(version, str):
        raise DocumentError(
            "the field manifest_version is missing: this is no lora_hub manifest",
            where=where,
        )
    major = version.partition(".")[0]
    if major != str(KNOWN_MAJOR):
        raise DocumentError(
            f"manifest version {version!r} is not understood, this program reads "
            f"{KNOWN_MAJOR}.x",
            where=f"{where}#/manifest_version",
            hint="pip install --upgrade lora-hub",
        )
