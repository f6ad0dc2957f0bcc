"""Is a whole registry sound? Every event, key, signature, facet and byte."""

import re
from collections.abc import Iterator

from lora_hub import digest, refs
from lora_hub.errors import IntegrityError, TrustError
from lora_hub.package.layout import LARGEST_BYTES
from lora_hub.registry.chain import Link, seq_of
from lora_hub.registry.documents import CONFIG, PublishEvent
from lora_hub.registry.fetch import open_published
from lora_hub.registry.problem import Problem, noted
from lora_hub.registry.publish import describe
from lora_hub.registry.registry import Entry, Registry, blob_path
from lora_hub.registry.resolve import resolved
from lora_hub.registry.verify import check_signature
from lora_hub.signing.statement import SIGNATURE_NAME

_HINT = "restore the file from where the registry came from"

# What may lie in a registry beside its own files: a page for people, and what git keeps.
_BESIDE = re.compile(r"README\.md|LICENSE|\..+")
_KNOWN = re.compile(
    r"index/(?P<name>[^/]+/[^/]+)/(?P<event>[^/]+)"
    r"|keys/(?P<namespace>[^/]+)/(?P<keys>[^/]+)"
    r"|blobs/sha256/[0-9a-f]{2}/(?P<blob>[0-9a-f]{64})"
)


def check(registry: Registry) -> tuple[Problem, ...]:
    """Return everything that is wrong, nothing if the registry is sound.

    Files no event names are fine: a publisher was stopped, or is at work.
    """
    problems: list[Problem] = []
    with noted(problems, f"{registry.where}/{CONFIG}"):
        _ = registry.config
    problems += _check_paths(registry)
    for namespace in registry.namespaces():
        with noted(problems, f"{registry.where}/keys/{namespace}"):
            registry.key_chain(namespace)
    for name in registry.names():
        with noted(problems, f"{registry.where}/index/{name}"):
            for entry in registry.versions(name):
                with noted(problems, f"{name}@{entry.version}"):
                    _check_version(registry, entry)
    # What is wrong with a key is met again at each version that it signed.
    return tuple(dict.fromkeys(problems))


def _check_paths(registry: Registry) -> Iterator[Problem]:
    for path in registry.store.list(""):
        where = f"{registry.where}/{path}"
        match = _KNOWN.fullmatch(path)
        if match is None or not _is_known(match):
            if path != CONFIG and not _BESIDE.fullmatch(path):
                yield Problem(where, "the file is none of a registry", "remove it")
        elif match["blob"]:
            yield from _check_blob(registry, path, f"sha256:{match['blob']}")


def _is_known(match: re.Match[str]) -> bool:
    if match["blob"]:
        return True
    if match["name"]:
        return refs.is_name(match["name"]) and seq_of(match["event"]) is not None
    return refs.is_part(match["namespace"]) and seq_of(match["keys"]) is not None


def _check_blob(registry: Registry, path: str, named: str) -> Iterator[Problem]:
    problems: list[Problem] = []
    where = f"{registry.where}/{path}"
    with noted(problems, where):
        if path != blob_path(named):
            raise IntegrityError("the file lies in the wrong folder", where=where)
        found = registry.store.stat(path)
        if found is not None and found.size_bytes > LARGEST_BYTES:
            raise IntegrityError(
                f"the file has {found.size_bytes} bytes, those of packages have at most "
                f"{LARGEST_BYTES}",
                where=where,
                hint=_HINT,
            )
        actual = digest.of_chunks(registry.store.chunks(path))
        if actual != named:
            raise IntegrityError(
                f"the bytes have digest {actual}, expected {named}",
                where=where,
                hint=_HINT,
            )
    yield from problems


def _check_version(registry: Registry, entry: Entry) -> None:
    event = entry.event
    package = open_published(resolved(entry), registry)
    said = describe(
        package,
        signature=package.read(SIGNATURE_NAME),
        link=Link(event.seq, event.prev),
        ts=event.ts,
    )
    if said != event:
        raise IntegrityError(
            f"the event says other things than the manifest: {_difference(event, said)}",
            where=f"{registry.where}/index/{event.name}/{event.seq:06d}.json",
            hint=_HINT,
        )
    namespace = event.name.partition("/")[0]
    # A withdrawn version may have been signed by a key that is no longer believed.
    keys = registry.all_keys(namespace) if entry.yanked else registry.keys(namespace)
    if not keys:
        raise TrustError(
            "nobody claimed the namespace", where=f"{registry.where}/keys/{namespace}"
        )
    check_signature(package, keys)
    for file in package.manifest.files:
        # The bytes themselves were compared with their names above.
        path = blob_path(file.sha256)
        found = registry.store.stat(path)
        if found is None or found.size_bytes != file.size:
            size = "is missing" if found is None else f"has {found.size_bytes} bytes"
            raise IntegrityError(
                f"{file.path} of {event.name} {event.version} {size}, the manifest says "
                f"{file.size} bytes",
                where=f"{registry.where}/{path}",
                hint=_HINT,
            )


def _difference(event: PublishEvent, manifest: PublishEvent) -> str:
    return ", ".join(
        f"{field} {getattr(event, field)!r} and {getattr(manifest, field)!r}"
        for field in event.__struct_fields__
        if getattr(event, field) != getattr(manifest, field)
    )
