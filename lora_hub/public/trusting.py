"""Whose keys this machine believes: list, add, forget, rotate."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_hub.public.keys import read_key

if TYPE_CHECKING:
    from lora_hub.registry.trust import Pin

PathLike = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class Pinned:
    """A namespace, the keys believed for it, and where they were first met."""

    namespace: str
    fingerprints: tuple[str, ...]
    registry: str
    pinned: str


def pins() -> tuple[Pinned, ...]:
    """Return every namespace whose keys are pinned."""
    from lora_hub.registry.trust import TrustStore

    return tuple(_shown(pin) for pin in TrustStore().list())


def is_pinned(namespace: str) -> bool:
    from lora_hub.registry.trust import TrustStore

    return TrustStore().get(namespace) is not None


def believe(namespace: str, keys: Sequence[PathLike], *, replace: bool = False) -> Pinned:
    """Pin public keys (files) for a namespace, or `replace` those pinned.

    Raises:
        TrustError: it is pinned to other keys and nothing is to be replaced.
        NotFoundError: it is not pinned and something is to be replaced.
    """
    from lora_hub.registry.trust import TrustStore

    store = TrustStore()
    pems = [read_key(key) for key in keys]
    return _shown((store.rotate if replace else store.add)(namespace, pems))


def forget(namespace: str) -> None:
    """Remove the pin of a namespace."""
    from lora_hub.registry.trust import TrustStore

    TrustStore().remove(namespace)


def rotate(
    namespace: str,
    keys: Sequence[PathLike],
    key: PathLike,
    *,
    registry: PathLike | None = None,
) -> None:
    """Publish that these public keys, and no others, sign for a namespace from now on.

    Raises:
        TrustError: `key` (a private key's file) does not sign for the namespace now.
    """
    from lora_hub.public.find import open_registry
    from lora_hub.registry import publish
    from lora_hub.signing.keys import private_key

    private = private_key(read_key(key), where=str(key))
    publish.rotate(
        open_registry(registry), namespace, [read_key(each) for each in keys], private
    )


def _shown(pin: "Pin") -> Pinned:
    from lora_hub.signing import keys

    return Pinned(
        pin.namespace,
        tuple(keys.fingerprint(keys.public_key(pem)) for pem in pin.public_keys),
        pin.registry,
        pin.pinned,
    )
