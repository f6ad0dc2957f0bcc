"""Events signed with a key of the namespace: yank, unyank, rotation.

The message is the event's canonical JSON without the field `auth`, bound to a type of its
own (DSSE's pre-authentication encoding), so that no signature of one kind can be shown as
one of another. `auth` is the base64 of the DER signature.
"""

import base64
from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeVar

import msgspec

from lora_hub import canonical, strict_json
from lora_hub.errors import TrustError
from lora_hub.registry import documents
from lora_hub.registry.documents import KeyEvent, UnyankEvent, YankEvent
from lora_hub.signing import envelope, keys

if TYPE_CHECKING:
    from lora_hub.signing.keys import PrivateKey

EVENT_TYPE = "application/vnd.lorahub.event+json"

S = TypeVar("S", YankEvent, UnyankEvent, KeyEvent)


def authorize(event: S, key: "PrivateKey") -> S:
    """Return the event signed with the key: with `signer` and `auth` of its own."""
    event = msgspec.structs.replace(event, signer=keys.hint(key), auth="")
    signature = keys.sign(key, _message(documents.encode(event)))
    return msgspec.structs.replace(event, auth=base64.b64encode(signature).decode())


def check(
    data: bytes,
    event: YankEvent | UnyankEvent | KeyEvent,
    public_keys: Iterable[bytes],
    *,
    where: str,
) -> None:
    """Raise `TrustError` unless the event in these bytes is signed with one of the keys."""
    known = {keys.hint(key): key for key in map(keys.public_key, public_keys)}
    public = known.get(event.signer or "")
    if public is None or event.auth is None:
        raise TrustError(
            "the event is signed with no key of the namespace",
            where=where,
            hint="whoever wrote it does not own the namespace",
        )
    signature = envelope.decode_base64(event.auth, where=where)
    if not keys.is_signed(public, signature, _message(data)):
        raise TrustError("the event's signature is not one over it", where=where)


def _message(data: bytes) -> bytes:
    value = strict_json.decode_object(data, where="event")
    value.pop("auth", None)
    return envelope.pae(canonical.encode(value), payload_type=EVENT_TYPE)
