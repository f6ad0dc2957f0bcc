"""A reference → a package in the cache that a believed key signed."""

from dataclasses import dataclass
from pathlib import Path

from lora_hub.errors import IntegrityError
from lora_hub.package.package import Package
from lora_hub.refs import Reference
from lora_hub.registry.cache import Cache
from lora_hub.registry.fetch import fetch
from lora_hub.registry.registry import Registry
from lora_hub.registry.resolve import resolve
from lora_hub.registry.trust import TrustStore
from lora_hub.registry.verify import check_signature
from lora_hub.signing.verify import Signer


@dataclass(frozen=True, slots=True)
class Pulled:
    """What a reference meant, and where it is now.

    Attributes:
        package: held in memory: the bytes that were verified, for who uses them.
        folder: in the cache, read-only.
        notes: what the user should hear: a withdrawn version, a first contact.
    """

    package: Package
    folder: Path
    signer: Signer
    notes: tuple[str, ...]


def pull(
    reference: Reference,
    registry: Registry,
    cache: Cache,
    trust: TrustStore,
) -> Pulled:
    """Return the package that the reference means: every byte checked, the signer believed.

    A namespace that is met for the first time is pinned when its package proved good, not
    before.

    Raises:
        NotFoundError, IntegrityError, TrustError, StoreError: as `resolve`, `fetch`,
            `TrustStore.judge` and `check_signature`.
    """
    resolved = resolve(reference, registry)
    chain = registry.key_chain(reference.namespace)
    verdict = trust.judge(reference.namespace, chain, registry.where)
    try:
        fetched = fetch(resolved, registry, cache)
        signer = check_signature(fetched.package, verdict.keys)
    except IntegrityError as error:
        # What was fetched before may have been damaged since; what lies elsewhere says
        # its own hint.
        if error.where and error.where.startswith(str(cache.folder)):
            error.hint = "the cache was damaged: `lorahub cache prune`, then pull again"
        raise
    trust.keep(verdict)
    notes = (*resolved.notes, *verdict.notes)
    return Pulled(fetched.package, fetched.folder, signer, notes)
