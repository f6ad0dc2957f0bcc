"""Names, versions, keys and blobs of one registry, every one checked as it is read."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lora_hub import digest, refs, settings
from lora_hub.errors import (
    DocumentError,
    InputError,
    IntegrityError,
    NotFoundError,
)
from lora_hub.registry import authority, chain, documents
from lora_hub.registry.chain import Link, Recorded
from lora_hub.registry.documents import (
    CONFIG,
    Event,
    KeyEvent,
    PublishEvent,
    RegistryConfig,
    UnyankEvent,
    YankEvent,
)
from lora_hub.registry.stores.local import LocalStore
from lora_hub.registry.stores.protocol import Store
from lora_hub.signing import keys


@dataclass(frozen=True, slots=True)
class Entry:
    """One version as it stands now.

    Attributes:
        package: digest of its manifest.
        yanked: why it was withdrawn, None where it is not.
        event: what was said when it was published.
    """

    full_name: str
    version: str
    package: str
    yanked: str | None
    event: PublishEvent


@dataclass(frozen=True, slots=True)
class Registry:
    """A registry in a store. Make one with `open_registry` or `init`."""

    store: Store

    @property
    def where(self) -> str:
        return self.store.where

    @property
    def config(self) -> RegistryConfig:
        """The registry's own document.

        Raises:
            NotFoundError: the store holds no registry.
            DocumentError: it cannot be read.
        """
        where = f"{self.where}/{CONFIG}"
        data = self.store.read(CONFIG, max_bytes=documents.MAX_EVENT_BYTES)
        config: RegistryConfig = documents.decode(data, RegistryConfig, where=where)
        return config

    def names(self) -> Iterator[str]:
        """Yield every published `namespace/name`, sorted."""
        last = None
        for path in self.store.list("index"):
            parts = path.split("/")
            name = "/".join(parts[1:3])
            is_event = len(parts) == 4 and chain.seq_of(parts[3]) is not None
            if is_event and name != last and refs.is_name(name):
                last = name
                yield name

    def namespaces(self) -> Iterator[str]:
        """Yield every namespace that a key claims, sorted."""
        last = None
        for path in self.store.list("keys"):
            parts = path.split("/")
            if len(parts) == 3 and parts[1] != last and refs.is_part(parts[1]):
                last = parts[1]
                yield last

    def events(self, full_name: str) -> tuple[Event, ...]:
        """Return all that happened to a name, oldest first; nothing is fine.

        Raises:
            IntegrityError: the numbered files are not one unbroken story.
            TrustError: a version was withdrawn by somebody else than the namespace.
        """
        recorded = chain.read(self.store, index_folder(full_name), Event)
        self._check_story(full_name, recorded)
        return tuple(record.event for record in recorded)

    def append(
        self,
        full_name: str,
        build: Callable[[tuple[Event, ...], Link], Event | None],
    ) -> Event | None:
        """Add the event that `build` makes from the events so far and the next place.

        `build` is asked again when another publisher was first; None adds nothing.
        """

        def checked(recorded: tuple[Recorded, ...], link: Link) -> Event | None:
            self._check_story(full_name, recorded)
            return build(tuple(record.event for record in recorded), link)

        event: Event | None = chain.append(
            self.store, index_folder(full_name), Event, checked
        )
        return event

    def versions(self, full_name: str) -> tuple[Entry, ...]:
        """Return the versions of a name as they stand now, lowest first.

        Raises:
            NotFoundError: nothing was published under the name.
        """
        entries: dict[str, Entry] = {}
        for event in self.events(full_name):
            if isinstance(event, PublishEvent):
                entry = Entry(full_name, event.version, event.package, None, event)
            else:
                reason = event.reason if isinstance(event, YankEvent) else None
                published = entries[event.version]
                entry = Entry(
                    full_name, event.version, published.package, reason, published.event
                )
            entries[event.version] = entry
        if not entries:
            raise NotFoundError(
                f"the registry has nothing of the name {full_name}",
                where=self.where,
                hint=_near(full_name, self.names()),
            )
        return tuple(sorted(entries.values(), key=lambda e: refs.parse_version(e.version)))

    def key_chain(self, namespace: str) -> tuple[KeyEvent, ...]:
        """Return the namespace's key events, oldest first; none where nobody claimed it.

        Raises:
            IntegrityError: the numbered files are not one unbroken story.
            TrustError: keys changed without a signature of a key before.
        """
        folder = keys_folder(namespace)
        recorded = chain.read(self.store, folder, KeyEvent)
        for index, record in enumerate(recorded):
            where = f"{self.where}/{chain.path_of(folder, index + 1)}"
            if record.event.namespace != namespace:
                raise IntegrityError(
                    f"the keys are those of {record.event.namespace!r}", where=where
                )
            _check_keys(record.event, where)
            if index:
                before = public_keys(recorded[index - 1].event)
                authority.check(record.data, record.event, before, where=where)
        return tuple(record.event for record in recorded)

    def keys(self, namespace: str) -> tuple[bytes, ...]:
        """Return the PEM texts of the keys that sign for the namespace now."""
        events = self.key_chain(namespace)
        return public_keys(events[-1]) if events else ()

    def all_keys(self, namespace: str) -> tuple[bytes, ...]:
        """Return the PEM texts of all keys that ever signed for the namespace.

        An event stays valid when the key that signed it is later left out.
        """
        return tuple(
            pem for event in self.key_chain(namespace) for pem in public_keys(event)
        )

    def append_keys(
        self,
        namespace: str,
        build: Callable[[tuple[KeyEvent, ...], Link], KeyEvent | None],
    ) -> KeyEvent | None:
        """Add the key event that `build` makes; see `append`."""

        def checked(recorded: tuple[Recorded, ...], link: Link) -> KeyEvent | None:
            return build(tuple(record.event for record in recorded), link)

        event: KeyEvent | None = chain.append(
            self.store, keys_folder(namespace), KeyEvent, checked
        )
        return event

    def blob(self, blob_digest: str, *, max_bytes: int) -> bytes:
        """Return the bytes that have the digest.

        Raises:
            NotFoundError: the registry does not keep them.
            IntegrityError: it keeps other bytes under that name.
        """
        path = blob_path(blob_digest)
        data = self.store.read(path, max_bytes=max_bytes)
        digest.check(data, blob_digest, where=f"{self.where}/{path}")
        return data

    def put_blob(self, data: bytes) -> str:
        """Keep the bytes and return their digest; keeping them twice is one."""
        found = digest.of_bytes(data)
        path = blob_path(found)
        if not self.store.write(path, [data], if_absent=True) and (
            # Damaged since: these are the right bytes, so they may take its place.
            digest.of_chunks(self.store.chunks(path)) != found
        ):
            self.store.write(path, [data], if_absent=False)
        return found

    def _check_story(self, full_name: str, recorded: tuple[Recorded, ...]) -> None:
        published: set[str] = set()
        history: tuple[bytes, ...] | None = None
        for seq, record in enumerate(recorded, 1):
            event = record.event
            where = f"{self.where}/{chain.path_of(index_folder(full_name), seq)}"
            if event.name != full_name:
                raise IntegrityError(f"the event is one of {event.name}", where=where)
            if isinstance(event, PublishEvent) == (event.version in published):
                said = "twice" if event.version in published else "never"
                raise IntegrityError(
                    f"version {event.version} was published {said}", where=where
                )
            published.add(event.version)
            if isinstance(event, (YankEvent, UnyankEvent)):
                if history is None:
                    history = self.all_keys(full_name.partition("/")[0])
                authority.check(record.data, event, history, where=where)


def init(folder: Path, name: str) -> Registry:
    """Make the folder a registry of that name; one that is so already stays as it is.

    Raises:
        InputError: the name is misspelt, or the folder is a registry of another name.
    """
    if not refs.is_part(name):
        raise InputError(
            f"{name!r} cannot name a registry",
            hint=f"the name of a registry is {refs.PART_RULE}",
        )
    registry = Registry(LocalStore(folder))
    config = RegistryConfig(schema="lorahub.registry/1", name=name)
    if (
        not registry.store.write(CONFIG, [documents.encode(config)], if_absent=True)
        and registry.config != config
    ):
        raise InputError(
            f"is a registry already, of the name {registry.config.name!r}",
            where=str(folder),
        )
    return registry


def open_registry(location: str | Path) -> Registry:
    """Return the registry in a folder.

    Raises:
        InputError: a URL: only folders are supported so far.
        NotFoundError: the folder does not exist or holds no registry.
        DocumentError: its `config.json` is no registry's.
    """
    if "://" in str(location):
        scheme = str(location).partition("://")[0]
        raise InputError(
            f"registries at {scheme}:// are not supported yet",
            where=str(location),
            hint="give the folder of a registry",
        )
    folder = settings.expanded(str(location))
    registry = Registry(LocalStore(folder))
    try:
        _ = registry.config
    except NotFoundError:
        missing = "holds no registry" if folder.is_dir() else "there is no such folder"
        hint = f"make one with `lorahub registry init {folder}`"
        if names := settings.registry_names():
            hint = f"config.toml names {', '.join(names)}; or {hint}"
        raise NotFoundError(missing, where=str(folder), hint=hint) from None
    except DocumentError as error:
        raise DocumentError(
            error.problem, where=error.where, hint="this is no registry's config.json"
        ) from error
    return registry


def public_keys(event: KeyEvent) -> tuple[bytes, ...]:
    """Return the PEM texts of an event as bytes."""
    return tuple(pem.encode() for pem in event.keys)


def _check_keys(event: KeyEvent, where: str) -> None:
    # Keys are compared as texts, so each has to stand in its one spelling.
    for pem in public_keys(event):
        try:
            key = keys.public_key(pem, where=where)
        except InputError as error:
            raise IntegrityError(
                f"a key cannot be read: {error.problem}", where=where
            ) from error
        if keys.public_pem(key) != pem:
            raise IntegrityError("a key is not in its one spelling", where=where)


def index_folder(full_name: str) -> str:
    namespace, name = refs.parse_name(full_name)
    return f"index/{namespace}/{name}"


def keys_folder(namespace: str) -> str:
    refs.check_namespace(namespace)
    return f"keys/{namespace}"


def blob_path(blob_digest: str) -> str:
    name = digest.hex_of(blob_digest)
    return f"blobs/sha256/{name[:2]}/{name}"


def _near(full_name: str, names: Iterator[str]) -> str:
    import difflib

    known = list(names)
    near = difflib.get_close_matches(full_name, known, n=3, cutoff=0.8)
    if near:
        return f"did you mean {' or '.join(near)}?"
    if not known:
        return "the registry is empty"
    more = f" and {len(known) - 5} more" if len(known) > 5 else ""
    return f"it has {', '.join(known[:5])}{more}"
