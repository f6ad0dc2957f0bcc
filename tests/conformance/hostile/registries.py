"""Registries whose keeper, or whoever got at his folder, is the enemy."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.conformance.hostile.case import SECRET, key, rows

EVENT = "index/style/tiny/000001.json"
KEYS = "keys/style/000001.json"


def event_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "registry" / EVENT).read_bytes())


def blob(folder: Path, digest: str) -> Path:
    name = digest.removeprefix("sha256:")
    return folder / "registry/blobs/sha256" / name[:2] / name


def blobs(folder: Path) -> dict[str, Path]:
    """Return file name → the blob of it, the manifest and the signature among them."""
    event = event_of(folder)
    manifest = json.loads(blob(folder, event["package"]).read_bytes())
    listed = {file["path"]: blob(folder, file["sha256"]) for file in manifest["files"]}
    own = {"lorahub.json": event["package"], "model.sig": event["signature"]}
    return listed | {name: blob(folder, digest) for name, digest in own.items()}


def at_blob(name: str, change: Callable[[Path], object]) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        path = blobs(folder)[name]
        change(path)

    return build


def at_file(name: str, change: Callable[[Path], object]) -> Callable[[Path], None]:
    return lambda folder: change(folder / "registry" / name)


def flip(path: Path) -> None:
    data = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def longer(path: Path) -> None:
    path.chmod(0o644)
    path.write_bytes(path.read_bytes() + b"\n")


def hole(path: Path) -> None:
    path.chmod(0o644)
    with open(path, "wb") as stream:
        stream.truncate(60 * 10**9)


def link(path: Path) -> None:
    """Put the file outside and a link in its place."""
    outside = path
    while outside.name != "registry":
        outside = outside.parent
    outside = outside.parent / "outside"
    outside.mkdir()
    path.rename(outside / path.name)
    path.symlink_to(outside / path.name)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def stranger(path: Path) -> None:
    """Let the namespace be a stranger's."""
    from lora_hub.signing import keys

    event = json.loads(path.read_bytes())
    event["keys"] = [keys.public_pem(key(7)).decode()]
    write(path, event)


def write(path: Path, document: dict[str, Any]) -> None:
    from lora_hub import canonical

    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        path.chmod(0o644)
    path.write_bytes(canonical.encode(document))


def edited(name: str, **fields: Any) -> Callable[[Path], None]:
    """Return the builder of a registry with fields of one of its documents changed."""

    def build(folder: Path) -> None:
        path = folder / "registry" / name
        write(path, json.loads(path.read_bytes()) | fields)

    return build


def rotated(folder: Path) -> None:
    """Add a rotation to a stranger's key that no key before has signed."""
    import hashlib

    from lora_hub.signing import keys

    first = (folder / "registry" / KEYS).read_bytes()
    prev = f"sha256:{hashlib.sha256(first).hexdigest()}"
    pem = keys.public_pem(key(7)).decode()
    event = json.loads(first) | {"seq": 2, "prev": prev, "keys": [pem]}
    event |= {"signer": keys.hint(key(7)), "auth": "MAYCAQACAQA="}
    write(folder / "registry/keys/style/000002.json", event)


def yanked(folder: Path) -> None:
    """Withdraw the version in the name of the namespace, signed by a stranger."""
    import hashlib

    from lora_hub.signing import keys

    first = (folder / "registry" / EVENT).read_bytes()
    event = {
        "event": "yank",
        "v": 1,
        "seq": 2,
        "prev": f"sha256:{hashlib.sha256(first).hexdigest()}",
        "ts": "2026-11-23T00:00:00Z",
        "name": "style/tiny",
        "version": "1.0.0",
        "reason": "because",
        "signer": keys.hint(key(7)),
        "auth": "MAYCAQACAQA=",
    }
    write(folder / "registry/index/style/tiny/000002.json", event)


def renamed(folder: Path) -> None:
    """Show one package under the name of another."""
    event = event_of(folder) | {"name": "style/good"}
    write(folder / "registry/index/style/good/000001.json", event)
    (folder / "registry/index/style/tiny/000001.json").unlink()
    (folder / "registry/index/style/tiny").rmdir()
    (folder / "registry/index/style/good").rename(folder / "registry/index/style/tiny")


nowhere = edited(EVENT, package="sha256:" + "0" * 64)


def poisoned(folder: Path) -> None:
    """Let the manifest be one that lists files far away, by its true digest."""
    import hashlib

    from lora_hub import canonical

    (folder / "outside").mkdir()
    (folder / "outside/LICENSE").write_text(SECRET)
    path = blobs(folder)["lorahub.json"]
    manifest = json.loads(path.read_bytes())
    data = SECRET.encode()
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    manifest["files"].append(
        {
            "path": "../outside/LICENSE",
            "role": "license",
            "size": len(data),
            "sha256": digest,
        }
    )
    changed = canonical.encode(manifest)
    package = f"sha256:{hashlib.sha256(changed).hexdigest()}"
    for at, content in ((digest, data), (package, changed)):
        blob(folder, at).parent.mkdir(exist_ok=True)
        blob(folder, at).write_bytes(content)
    write(folder / "registry" / EVENT, event_of(folder) | {"package": package})


CASES = (
    *rows(
        "registry",
        "pull: IntegrityError",
        "1 changed bytes",
        (
            "blob of the weights with a bit flipped",
            at_blob("adapter_model.safetensors", flip),
            "digest",
        ),
        (
            "blob of the manifest with a bit flipped",
            at_blob("lorahub.json", flip),
            "digest",
        ),
        ("blob of the signature with a bit flipped", at_blob("model.sig", flip), "digest"),
        ("blob that grew", at_blob("adapter_config.json", longer), "are read"),
        ("blob of 60 GB, all hole", at_blob("adapter_model.safetensors", hole), "are read"),
        ("event of another name", renamed, "the event is one of style/good"),
        ("event of another version", edited(EVENT, version="2.0.0"), "2.0.0"),
    ),
    *rows(
        "registry",
        "pull: StoreError",
        "20 links and devices",
        (
            "blob that is a link out of the registry",
            at_blob("adapter_model.safetensors", link),
            "symbolic link",
        ),
        ("event that is a link out of the registry", at_file(EVENT, link), "symbolic link"),
        ("blob that is a named pipe", at_blob("README.md", pipe), "no regular file"),
        ("event that is a named pipe", at_file(EVENT, pipe), "no regular file"),
    ),
    *rows(
        "registry",
        "pull: IntegrityError",
        "2 manifest",
        ("event of 60 GB, all hole", at_file(EVENT, hole), "are read"),
        (
            "event that is no JSON",
            at_file(EVENT, lambda path: path.write_bytes(b"\x80\x04.")),
            "cannot be read",
        ),
        (
            "event nested a hundred thousand deep",
            at_file(EVENT, lambda path: path.write_bytes(b'{"a":' * 100_000)),
            "levels",
        ),
        (
            "event with a key twice",
            at_file(
                EVENT,
                lambda path: path.write_bytes(
                    path.read_bytes().replace(b'"name":', b'"name":"x/y","name":', 1)
                ),
            ),
            "stands twice",
        ),
        ("event of a kind to come", edited(EVENT, v=2), "cannot be read"),
        ("event whose number is another", edited(EVENT, seq=2), "does not follow"),
        (
            "event that names one before it",
            edited(EVENT, prev="sha256:" + "0" * 64),
            "does not follow",
        ),
        (
            "event before which one is missing",
            at_file(EVENT, lambda path: path.rename(path.with_name("000002.json"))),
            "is missing",
        ),
        (
            "event with the millionth number",
            at_file(
                EVENT,
                lambda path: path.with_name("999999999.json").write_bytes(
                    path.read_bytes()
                ),
            ),
            "is missing",
        ),
        ("size of a package below zero", edited(EVENT, size_bytes=-1), "cannot be read"),
    ),
    *rows(
        "registry",
        "pull: NotFoundError",
        "1 changed bytes",
        ("event of a package that is not there", nowhere, "no such file"),
        (
            "blob that is missing",
            at_blob("adapter_config.json", Path.unlink),
            "no such file",
        ),
    ),
    *rows(
        "registry",
        "pull: DocumentError",
        "19 names and paths",
        ("manifest that lists files outside", poisoned, "#/files/3/path"),
    ),
    *rows(
        "registry",
        "pull: DocumentError",
        "2 manifest",
        (
            "registry of a version to come",
            edited("config.json", schema="lorahub.registry/2"),
            "#/schema",
        ),
        (
            "registry with a name twice",
            at_file(
                "config.json",
                lambda path: path.write_bytes(b'{"name":"x",' + path.read_bytes()[1:]),
            ),
            "stands twice",
        ),
    ),
    *rows(
        "registry",
        "pull: TrustError",
        "5 another key",
        ("namespace that became a stranger's", at_file(KEYS, stranger), "another key"),
        ("rotation that no key before signed", rotated, "sign"),
        ("withdrawal by a stranger", yanked, "sign"),
        ("keys removed", at_file(KEYS, Path.unlink), "no key is known"),
    ),
    *rows(
        "registry",
        "check: LH050",
        "1 changed bytes",
        ("blob that is not what its name says", at_blob("README.md", flip), "digest"),
        (
            "summary that is not the manifest's",
            edited(EVENT, summary="A better adapter."),
            "other things",
        ),
        ("rank that is not the manifest's", edited(EVENT, max_rank=1), "other things"),
    ),
    *rows(
        "registry",
        "check: LH050",
        "19 names and paths",
        (
            "file that is none of a registry",
            at_file(
                "index/../x.json".replace("..", "style"),
                lambda path: path.write_bytes(b"{}"),
            ),
            "none of a registry",
        ),
        (
            "event in a folder whose name steers",
            at_file(
                "index/style/\x1b[2J",
                lambda path: (path.mkdir(), (path / "000001.json").write_bytes(b"{}")),
            ),
            "none of a registry",
        ),
    ),
    *rows(
        "registry",
        "validate: LH050",
        "20 links and devices",
        ("blob in a registry that is a link", at_blob("README.md", link), "symbolic link"),
    ),
)
