"""Which keys this user believes for which namespace.

    <LORAHUB_HOME>/trust/<namespace>.json

The first registry that is met pins the keys of a namespace; from then on they are
believed whatever a registry says, and move only along a rotation signed by a key pinned
before. Names do not depend on registries, so neither do pins. `LORAHUB_TRUST=strict`
refuses a namespace that is not pinned yet.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from msgspec import Meta

from lora_hub import atomic, clock, refs, settings
from lora_hub.errors import DocumentError, InputError, NotFoundError, StoreError, TrustError
from lora_hub.manifest.document import Count, Document, Timestamp
from lora_hub.registry import documents
from lora_hub.registry.documents import KeyEvent, Part, Pem
from lora_hub.signing import keys

if TYPE_CHECKING:
    from lora_hub.registry.registry import Registry


class Pin(Document, frozen=True, kw_only=True):
    """One file of the trust store: the keys believed for a namespace.

    Attributes:
        registry: where the keys were first met; empty where the user gave them.
        seq: the number of the key event they come from; older ones move nothing.
    """

    schema: Literal["lorahub.pin/1"]
    namespace: Part
    keys: Annotated[tuple[Pem, ...], Meta(min_length=1, max_length=32)]
    registry: str = ""
    pinned: Timestamp
    seq: Count = 0

    @property
    def public_keys(self) -> tuple[bytes, ...]:
        return tuple(pem.encode() for pem in self.keys)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the store says about a namespace in a registry: nothing is written yet.

    Attributes:
        keys: PEM texts to verify with.
        notes: what the user should hear.
        pin: what `keep` will write, None where nothing changes.
        before: the pin that it takes the place of, None on first contact.
    """

    keys: tuple[bytes, ...]
    notes: tuple[str, ...] = ()
    pin: Pin | None = None
    before: Pin | None = None


# Who checks many packages asks for the same few pins each time.
@functools.lru_cache(maxsize=16)
def _decoded(data: bytes) -> Pin:
    pin: Pin = documents.decode(data, Pin, where="")
    return pin


class TrustStore:
    """Pins below a folder; by default the user's (`LORAHUB_HOME`)."""

    def __init__(self, folder: Path | None = None, *, strict: bool | None = None) -> None:
        self.folder = folder or settings.home() / "trust"
        self.strict = settings.is_strict() if strict is None else strict

    def get(self, namespace: str) -> Pin | None:
        """Return the namespace's pin, None where it has none.

        Raises:
            DocumentError: the file was damaged; nothing is believed until it is mended.
        """
        path = self._path(namespace)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StoreError(
                f"cannot be read: {error.strerror or error}", where=str(path)
            ) from error
        try:
            pin = _decoded(data)
        except DocumentError as error:
            error.where = f"{path}{error.where or ''}"
            error.hint = "remove the damaged file, then pin the key: lorahub trust add"
            raise
        return pin

    def list(self) -> tuple[Pin, ...]:
        """Return every pin, in order of namespaces.

        Raises:
            StoreError: the folder cannot be read; of one pin, see `get`.
        """
        try:
            names = sorted(path.stem for path in self.folder.glob("[!.]*.json"))
        except OSError as error:
            raise StoreError(
                f"cannot be read: {error.strerror or error}", where=str(self.folder)
            ) from error
        return tuple(pin for name in names if (pin := self.get(name)) is not None)

    def add(
        self, namespace: str, public_keys: Sequence[bytes], *, registry: str = ""
    ) -> Pin:
        """Pin these keys for a namespace that has no pin yet; return the pin.

        Raises:
            TrustError: the namespace is pinned to other keys.
            InputError: no keys, or one that cannot be read.
        """
        pin = _pin(namespace, public_keys, registry=registry)
        self._create(pin)
        return pin

    def rotate(self, namespace: str, public_keys: Sequence[bytes]) -> Pin:
        """Let these keys take the place of those pinned; return the pin.

        Raises:
            NotFoundError: the namespace has no pin.
            InputError: no keys, or one that cannot be read.
        """
        before = self._known(namespace)
        pin = _pin(namespace, public_keys, registry=before.registry, seq=before.seq)
        self._replace(pin)
        return pin

    def remove(self, namespace: str) -> None:
        """Forget the namespace: the next registry that is met pins it anew.

        Raises:
            NotFoundError: the namespace has no pin.
        """
        self._known(namespace)
        path = self._path(namespace)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(
                f"cannot be removed: {error.strerror or error}", where=str(path)
            ) from error

    def judge(self, namespace: str, chain: Sequence[KeyEvent], location: str) -> Verdict:
        """Return which keys to verify with, from the pin and a registry's key events.

        Args:
            namespace: whose packages are to be verified.
            chain: what the registry says, each event proven by a key of the one before
                (`Registry.key_chain`); may be empty.
            location: what to call the registry.

        Raises:
            TrustError: nobody's keys are known; the namespace is not pinned and the store
                is strict; or the keys changed without a rotation signed by a pinned key.
        """
        pin = self.get(namespace)
        if pin is not None:
            return _follow(pin, chain, location)
        if not chain:
            raise TrustError(
                f"no key is known for the namespace {namespace!r}",
                where=location,
                hint=f"add it: lorahub trust add {namespace} KEY.pub",
            )
        current = chain[-1]
        shown = _shown(current.keys)
        if self.strict:
            raise TrustError(
                f"the namespace {namespace!r} is not pinned, and LORAHUB_TRUST=strict "
                f"believes nothing else; the registry says {shown}",
                where=location,
                hint=f"compare it with its owner's, then: lorahub trust add {namespace} "
                "KEY.pub",
            )
        new = _pin(namespace, _bytes(current.keys), registry=location, seq=current.seq)
        said = f"first contact: the namespace {namespace!r} is pinned to {shown}"
        return Verdict(new.public_keys, (f"{said}, as {location} says",), new)

    def keep(self, verdict: Verdict) -> None:
        """Write what the verdict pins.

        Raises:
            TrustError: another process pinned other keys meanwhile.
        """
        if verdict.pin is None:
            return
        if verdict.before is None or self.get(verdict.pin.namespace) != verdict.before:
            self._create(verdict.pin)  # fine where another process wrote the same keys
        else:
            self._replace(verdict.pin)

    def check(self, namespace: str, registry: "Registry") -> Verdict:
        """Judge what the registry says, and keep it."""
        verdict = self.judge(namespace, registry.key_chain(namespace), registry.where)
        self.keep(verdict)
        return verdict

    def _path(self, namespace: str) -> Path:
        refs.check_namespace(namespace)
        return self.folder / f"{namespace}.json"

    def _known(self, namespace: str) -> Pin:
        pin = self.get(namespace)
        if pin is None:
            raise NotFoundError(
                f"the namespace {namespace!r} has no pin",
                where=str(self.folder),
                hint="see `lorahub trust list`",
            )
        return pin

    def _create(self, pin: Pin) -> None:
        if atomic.write_new(self._path(pin.namespace), [documents.encode(pin)]):
            return
        existing = self._known(pin.namespace)
        if set(existing.keys) != set(pin.keys):
            raise TrustError(
                f"the namespace {pin.namespace!r} is pinned to {_shown(existing.keys)}, "
                f"not to {_shown(pin.keys)}",
                where=str(self._path(pin.namespace)),
                hint=f"if its owner says so: lorahub trust rotate {pin.namespace} KEY.pub",
            )

    def _replace(self, pin: Pin) -> None:
        atomic.replace(self._path(pin.namespace), [documents.encode(pin)])


def _follow(pin: Pin, chain: Sequence[KeyEvent], location: str) -> Verdict:
    """Return the verdict for a pinned namespace."""
    current = chain[-1] if chain else None
    if current is None or set(current.keys) == set(pin.keys):
        return Verdict(keys=pin.public_keys)
    pinned = {keys.hint(keys.public_key(pem)) for pem in pin.public_keys}
    # A registry that shows an older state cannot move a pin back: only later events do.
    if any(event.seq > pin.seq and event.signer in pinned for event in chain):
        moved = _pin(
            pin.namespace, _bytes(current.keys), registry=pin.registry, seq=current.seq
        )
        said = f"a pinned key rotated the keys of the namespace {pin.namespace!r}"
        note = f"{said}: it is pinned to {_shown(current.keys)} now"
        return Verdict(moved.public_keys, (note,), moved, pin)
    both = tuple(pem for pem in current.keys if pem in pin.keys)
    if both:
        return Verdict(keys=_bytes(both))
    raise TrustError(
        f"the keys of the namespace {pin.namespace!r} changed: pinned is "
        f"{_shown(pin.keys)}, the registry says {_shown(current.keys)}, and no pinned key "
        "signed the change",
        where=location,
        hint="ask its owner; if the change is right: lorahub trust rotate "
        f"{pin.namespace} KEY.pub",
    )


def _pin(
    namespace: str, public_keys: Sequence[bytes], *, registry: str, seq: int = 0
) -> Pin:
    if not public_keys:
        raise InputError("no keys are given, expected at least one", where=namespace)
    return Pin(
        schema="lorahub.pin/1",
        namespace=namespace,
        keys=tuple(keys.public_pem(keys.public_key(pem)).decode() for pem in public_keys),
        registry=registry,
        pinned=clock.timestamp(),
        seq=seq,
    )


def _bytes(pems: Sequence[str]) -> tuple[bytes, ...]:
    return tuple(pem.encode() for pem in pems)


def _shown(pems: Sequence[str]) -> str:
    return " and ".join(keys.fingerprint(keys.public_key(pem.encode())) for pem in pems)
