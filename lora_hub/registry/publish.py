"""What changes a registry: push, yank, unyank, rotate.

Each ends in one event file; everything before it can be done again. So whoever is stopped
midway starts over and finishes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_hub import clock, digest, refs
from lora_hub.errors import AlreadyExists, InputError, NotFoundError, TrustError
from lora_hub.package.package import Package
from lora_hub.registry import authority
from lora_hub.registry.chain import Link
from lora_hub.registry.documents import (
    BaseFacet,
    Event,
    KeyEvent,
    PublishEvent,
    UnyankEvent,
    YankEvent,
)
from lora_hub.registry.registry import Entry, Registry
from lora_hub.registry.trust import TrustStore
from lora_hub.registry.verify import verify_package
from lora_hub.signing import envelope, keys
from lora_hub.signing.statement import SIGNATURE_NAME

if TYPE_CHECKING:
    from lora_hub.signing.keys import PrivateKey


@dataclass(frozen=True, slots=True)
class PushResult:
    """What was published.

    Attributes:
        package: its digest.
        seq: the number of its event.
        already: the registry had it before.
    """

    name: str
    version: str
    package: str
    seq: int
    already: bool


def push(
    package: Package,
    registry: Registry,
    *,
    public_key: bytes | None = None,
    trust: TrustStore | None = None,
) -> PushResult:
    """Publish a signed package: files first, the event last.

    The first push of a namespace claims it for the key that signed the package.

    Args:
        package: complete and signed.
        registry: where to.
        public_key: PEM text of the signer's key, asked for when nobody claimed the
            namespace yet.
        trust: its pin for the namespace stands in for `public_key`.

    Raises:
        AlreadyExists: the version is published with other bytes.
        TrustError: no signature, or by a key that does not sign for the namespace.
        IntegrityError: a file is missing, was added, or is not as the manifest says.
    """
    manifest = package.manifest
    namespace, _ = refs.parse_name(manifest.name)
    claimed = registry.keys(namespace)
    signer = verify_package(package, claimed or _claimants(namespace, public_key, trust))
    found = _published(registry.events(manifest.name), package)
    if found is None:
        signature = _put_files(package, registry)
        if not claimed:
            _claim(registry, namespace, signer.public_pem)
            verify_package(package, registry.keys(namespace))
        found = _announce(package, signature, registry)
    event, already = found
    return PushResult(manifest.name, manifest.version, package.digest, event.seq, already)


def describe(
    package: Package,
    *,
    signature: bytes,
    link: Link,
    ts: str,
) -> PublishEvent:
    """Return the event that publishes a package; `check.py` makes it again and compares.

    Args:
        package: what is published.
        signature: the bytes of its `model.sig`.
        link: its place among the name's events.
        ts: when.
    """
    manifest = package.manifest
    own_bytes = len(package.manifest_bytes) + len(signature)
    return PublishEvent(
        v=1,
        seq=link.seq,
        prev=link.prev,
        ts=ts,
        name=manifest.name,
        version=manifest.version,
        package=package.digest,
        signature=digest.of_bytes(signature),
        size_bytes=own_bytes + sum(file.size for file in manifest.files),
        summary=manifest.summary,
        base=BaseFacet(root=manifest.base.root, struct=manifest.base.struct),
        max_rank=manifest.adapter.summary.max_rank,
        target_names=manifest.adapter.summary.target_names,
        task=manifest.task.id,
        license=manifest.license,
    )


def yank(
    registry: Registry, full_name: str, version: str, reason: str, key: "PrivateKey"
) -> bool:
    """Withdraw a version; return False if it is withdrawn already.

    Ranges and `latest` pass over it; whoever names it exactly still gets it, with a
    warning.

    Raises:
        NotFoundError: there is no such version.
        TrustError: the key does not sign for the namespace.
        InputError: the reason is empty or long.
    """
    if not 1 <= len(reason) <= 500:
        raise InputError(f"the reason has {len(reason)} characters, expected 1 to 500")
    if not reason.isprintable():
        raise InputError("the reason holds a line break or a control character")
    _check_key(registry, full_name.partition("/")[0], key)

    def build(events: tuple[Event, ...], link: Link) -> YankEvent | None:
        if isinstance(_last_of(events, full_name, version), YankEvent):
            return None
        event = YankEvent(
            **_head(link),
            name=full_name,
            version=version,
            reason=reason,
            signer="",
            auth="",
        )
        return authority.authorize(event, key)

    return registry.append(full_name, build) is not None


def unyank(registry: Registry, full_name: str, version: str, key: "PrivateKey") -> bool:
    """Bring a withdrawn version back; return False if it is not withdrawn.

    Raises: as `yank`.
    """
    _check_key(registry, full_name.partition("/")[0], key)

    def build(events: tuple[Event, ...], link: Link) -> UnyankEvent | None:
        if not isinstance(_last_of(events, full_name, version), YankEvent):
            return None
        event = UnyankEvent(
            **_head(link), name=full_name, version=version, signer="", auth=""
        )
        return authority.authorize(event, key)

    return registry.append(full_name, build) is not None


def rotate(
    registry: Registry, namespace: str, public_keys: Sequence[bytes], key: "PrivateKey"
) -> KeyEvent:
    """Let these keys, and no others, sign for the namespace from now on.

    What keys left out had signed is no longer believed. So a key that merely retires
    stays beside the new one, and where one was stolen, the versions that it signed are
    withdrawn first.

    Args:
        registry: where.
        namespace: whose keys.
        public_keys: PEM texts.
        key: a private key that signs for the namespace now.

    Raises:
        TrustError: it does not.
        InputError: no keys, one that cannot be read, or versions that are not withdrawn
            would no longer be believed.
    """
    if not public_keys:
        raise InputError("no keys are given, expected at least one", where=namespace)
    pems = tuple(keys.public_pem(keys.public_key(pem)).decode() for pem in public_keys)
    _check_key(registry, namespace, key)
    _check_kept(registry, namespace, public_keys)

    def build(events: tuple[KeyEvent, ...], link: Link) -> KeyEvent:
        return authority.authorize(
            KeyEvent(**_head(link), namespace=namespace, keys=pems), key
        )

    event = registry.append_keys(namespace, build)
    assert event is not None
    return event


def _claimants(
    namespace: str, public_key: bytes | None, trust: TrustStore | None
) -> tuple[bytes, ...]:
    if public_key is not None:
        return (public_key,)
    pin = trust.get(namespace) if trust else None
    if pin is None:
        raise TrustError(
            f"nobody has claimed the namespace {namespace!r} in this registry yet",
            hint="--key FILE.pub: the first push claims it for the signer's key",
        )
    return pin.public_keys


def _put_files(package: Package, registry: Registry) -> bytes:
    """Keep every file of the package; return the signature's bytes."""
    for file in package.manifest.files:
        registry.put_blob(package.read_checked(file.path))
    registry.put_blob(package.manifest_bytes)
    signature = package.read(SIGNATURE_NAME)
    registry.put_blob(signature)
    return signature


def _claim(registry: Registry, namespace: str, public_pem: bytes) -> None:
    def build(events: tuple[KeyEvent, ...], link: Link) -> KeyEvent | None:
        if events:  # somebody else was first; the caller looks whose keys they are
            return None
        return KeyEvent(**_head(link), namespace=namespace, keys=(public_pem.decode(),))

    registry.append_keys(namespace, build)


def _announce(
    package: Package, signature: bytes, registry: Registry
) -> tuple[PublishEvent, bool]:
    found: tuple[PublishEvent, bool] | None = None

    def build(events: tuple[Event, ...], link: Link) -> PublishEvent | None:
        nonlocal found
        found = _published(events, package)
        if found is not None:  # another process pushed the same package meanwhile
            return None
        event = describe(package, signature=signature, link=link, ts=clock.timestamp())
        found = event, False
        return event

    registry.append(package.manifest.name, build)
    assert found is not None
    return found


def _published(
    events: tuple[Event, ...], package: Package
) -> tuple[PublishEvent, bool] | None:
    """Return the event that published the package, if there is one."""
    for event in events:
        if isinstance(event, PublishEvent) and event.version == package.manifest.version:
            if event.package != package.digest:
                raise AlreadyExists(
                    f"version {event.version} is published with other bytes: "
                    f"{event.package}, this package is {package.digest}",
                    where=event.name,
                    hint="a published version does not change; give this one a new version",
                )
            return event, True
    return None


def _last_of(events: tuple[Event, ...], full_name: str, version: str) -> Event:
    for event in reversed(events):
        if event.version == version:
            return event
    known = [event.version for event in events if isinstance(event, PublishEvent)]
    raise NotFoundError(
        f"version {version} was never published",
        where=full_name,
        hint=f"versions: {', '.join(known)}" if known else None,
    )


def _check_kept(registry: Registry, namespace: str, public_keys: Sequence[bytes]) -> None:
    """Refuse keys that would leave published versions without a signer."""
    kept = {keys.hint(keys.public_key(pem)) for pem in public_keys}
    lost = [
        f"{name} {entry.version}"
        for name in registry.names()
        if name.startswith(f"{namespace}/")
        for entry in registry.versions(name)
        if entry.yanked is None and _signer_of(entry, registry) not in kept
    ]
    if lost:
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        raise InputError(
            f"{', '.join(lost[:3])}{more}: signed with a key that is left out, and would "
            "no longer be believed",
            where=registry.where,
            hint="name that key as well, if it only retires; if it was stolen, withdraw "
            "these versions first with `lorahub yank`",
        )


def _signer_of(entry: Entry, registry: Registry) -> str:
    bundle = registry.blob(entry.event.signature, max_bytes=envelope.MAX_BUNDLE_BYTES)
    return envelope.parse(bundle, where=f"{entry.full_name} {entry.version}").hint


def _check_key(registry: Registry, namespace: str, key: "PrivateKey") -> None:
    known = {keys.hint(keys.public_key(pem)) for pem in registry.keys(namespace)}
    if keys.hint(key) not in known:
        expected = " or ".join(f"SHA256:{hint}" for hint in sorted(known)) or "no key yet"
        raise TrustError(
            f"the key {keys.fingerprint(key)} does not sign for the namespace "
            f"{namespace!r}, expected {expected}",
            where=registry.where,
        )


def _head(link: Link) -> dict[str, Any]:
    return {"v": 1, "seq": link.seq, "prev": link.prev, "ts": clock.timestamp()}
