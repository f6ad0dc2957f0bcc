"""Signatures that cover nothing, are by others, or say two things at once."""

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.conformance.hostile.case import WEIGHTS, key, rows
from tests.conformance.hostile.manifests import changed, flip, hole, made

SIGNATURE = "model.sig"


def bundle_of(payload: bytes, *, seed: int = 0, hint: str | None = None) -> bytes:
    """Return a bundle rightly signed over any payload."""
    from lora_hub.signing import envelope, keys

    private = key(seed)
    signature = keys.sign(private, envelope.pae(payload))
    return envelope.build(envelope.Envelope(payload, signature, hint or keys.hint(private)))


def payload_in(folder: Path) -> bytes:
    bundle = json.loads((folder / "package" / SIGNATURE).read_bytes())
    return base64.b64decode(bundle["dsseEnvelope"]["payload"])


def signed(change: Callable[[Any], object], **options: Any) -> Callable[[Path], None]:
    """Return the builder of a package with a right signature over an altered statement."""

    def build(folder: Path) -> None:
        statement = json.loads(payload_in(folder))
        change(statement)
        bundle = bundle_of(json.dumps(statement).encode(), **options)
        (folder / "package" / SIGNATURE).write_bytes(bundle)

    return build


def wrapped(change: Callable[[Any], object]) -> Callable[[Path], None]:
    """Return the builder of a package with the JSON around its signature altered."""

    def build(folder: Path) -> None:
        path = folder / "package" / SIGNATURE
        bundle = json.loads(path.read_bytes())
        change(bundle)
        path.write_bytes(json.dumps(bundle).encode())

    return build


def spelt(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        path = folder / "package" / SIGNATURE
        path.write_bytes(change(path.read_bytes()))

    return build


def rehash(statement: Any) -> None:
    """Make the root digest that of the list."""
    import hashlib

    digests = [entry["digest"] for entry in statement["predicate"]["resources"]]
    root = hashlib.sha256(b"".join(map(bytes.fromhex, digests))).hexdigest()
    statement["subject"][0]["digest"]["sha256"] = root


def ignoring(*names: str) -> Callable[[Path], None]:
    """Return the builder of a package whose signer left files out of the signature."""

    def change(statement: Any) -> None:
        predicate = statement["predicate"]
        predicate["serialization"]["ignore_paths"] += names
        predicate["resources"] = [
            entry for entry in predicate["resources"] if entry["name"] not in names
        ]
        rehash(statement)

    return signed(change)


def without(*names: str) -> Callable[[Path], None]:
    def change(statement: Any) -> None:
        predicate = statement["predicate"]
        predicate["resources"] = [
            entry for entry in predicate["resources"] if entry["name"] not in names
        ]
        rehash(statement)

    return signed(change)


def listing(name: str, digest: str = "0" * 64) -> Callable[[Path], None]:
    """Return the builder of a package whose signature lists one more file."""

    def change(statement: Any) -> None:
        statement["predicate"]["resources"].append(
            {"name": name, "algorithm": "sha256", "digest": digest}
        )
        rehash(statement)

    return signed(change)


def put(*path: str | int, value: Any) -> Callable[[Any], None]:
    def change(document: Any) -> None:
        for step in path[:-1]:
            document = document[step]
        document[path[-1]] = value

    return change


def by_a_stranger(folder: Path) -> None:
    bundle = bundle_of(payload_in(folder), seed=7)
    (folder / "package" / SIGNATURE).write_bytes(bundle)


def by_a_stranger_in_our_name(folder: Path) -> None:
    from lora_hub.signing import keys

    bundle = bundle_of(payload_in(folder), seed=7, hint=keys.hint(key()))
    (folder / "package" / SIGNATURE).write_bytes(bundle)


def with_his_key_beside(folder: Path) -> None:
    """Sign with a stranger's key and put its public half into the package."""
    from lora_hub.signing import keys
    from tests import packages

    by_a_stranger(folder)
    (folder / "package/key.pub").write_bytes(keys.public_pem(key(7)))
    packages.sign_folder(folder / "package", key(7))


def after(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / "package" / name).write_bytes(data)


def swap(folder: Path) -> None:
    """Exchange the digests of two files in the statement: the root is the same set's."""

    def change(statement: Any) -> None:
        first, second = statement["predicate"]["resources"][:2]
        first["digest"], second["digest"] = second["digest"], first["digest"]
        rehash(statement)

    signed(change)(folder)


SERIALIZATION = ("predicate", "serialization")
ENVELOPE = "dsseEnvelope"
MATERIAL = "verificationMaterial"


def twice(bundle: Any) -> None:
    bundle[ENVELOPE]["signatures"] *= 2


def stranger_first(folder: Path) -> None:
    """Put a stranger's signature before the right one."""
    path = folder / "package" / SIGNATURE
    right = json.loads(path.read_bytes())
    wrong = json.loads(bundle_of(payload_in(folder), seed=7))
    right[ENVELOPE]["signatures"].insert(0, wrong[ENVELOPE]["signatures"][0])
    path.write_bytes(json.dumps(right).encode())


CASES = (
    *rows(
        "package",
        "verify: TrustError",
        "3 stripped",
        (
            "signature removed",
            lambda folder: (folder / "package" / SIGNATURE).unlink(),
            "not signed",
        ),
        ("signature that is empty", after(SIGNATURE, b""), "cannot be read"),
        ("signature of an empty object", after(SIGNATURE, b"{}"), "cannot be read"),
        ("signature that is a pickle", after(SIGNATURE, b"\x80\x04."), "cannot be read"),
    ),
    *rows(
        "package",
        "verify: TrustError",
        "fact 4 covers nothing",
        ("signature that leaves out the weights", ignoring(WEIGHTS), "leaves out"),
        (
            "signature that leaves out weights and config",
            ignoring(WEIGHTS, "adapter_config.json"),
            "leaves out",
        ),
        ("signature that leaves out the manifest", ignoring("lorahub.json"), "leaves out"),
        (
            "signature that leaves out the whole folder",
            signed(put(*SERIALIZATION, "ignore_paths", value=["."])),
            "leaves out",
        ),
        (
            "signature that leaves out everything above",
            signed(put(*SERIALIZATION, "ignore_paths", value=[".."])),
            "leaves out",
        ),
        (
            "signature that leaves out a name that looks alike",
            signed(put(*SERIALIZATION, "ignore_paths", value=["./model.sig"])),
            "leaves out",
        ),
        ("signature that does not list the weights", without(WEIGHTS), "covers too little"),
        (
            "signature that does not list the manifest",
            without("lorahub.json"),
            "too little",
        ),
        (
            "signature that lists nothing",
            signed(
                lambda statement: (
                    put("predicate", "resources", value=[])(statement),
                    rehash(statement),
                )
            ),
            "too little",
        ),
        (
            "signature that follows links",
            signed(put(*SERIALIZATION, "allow_symlinks", value=True)),
            "symbolic links",
        ),
        (
            "signature of shards",
            signed(put(*SERIALIZATION, "method", value="shards")),
            "shards",
        ),
        (
            "signature over another hash",
            signed(put(*SERIALIZATION, "hash_type", value="blake2b")),
            "blake2b",
        ),
        (
            "resource under another hash",
            signed(put("predicate", "resources", 0, "algorithm", value="md5")),
            "md5",
        ),
        ("second signature behind the first", wrapped(twice), "length"),
        ("signature of a stranger before the right one", stranger_first, "length"),
    ),
    *rows(
        "package",
        "verify: TrustError",
        "5 another key",
        ("signature by a stranger", by_a_stranger, "signed with another key"),
        (
            "signature by a stranger in our name",
            by_a_stranger_in_our_name,
            "not one by the key",
        ),
        (
            "signature by a certificate",
            wrapped(
                put(MATERIAL, value={"certificate": {"rawBytes": ""}, "tlogEntries": []})
            ),
            "signed with a certificate",
        ),
        (
            "signature without a key's hint",
            wrapped(put(MATERIAL, "publicKey", "hint", value="")),
            "cannot be read",
        ),
        (
            "signature with entries of a log nobody asked",
            wrapped(put(MATERIAL, "tlogEntries", value=[{"logIndex": "1"}])),
            "cannot be read",
        ),
        (
            "signature of zeros",
            wrapped(put(ENVELOPE, "signatures", 0, "sig", value="MAYCAQACAQA=")),
            "not one by the key",
        ),
        (
            "signature that is no DER",
            wrapped(put(ENVELOPE, "signatures", 0, "sig", value="AAAA")),
            "not one by the key",
        ),
        (
            "signature of no bytes",
            wrapped(put(ENVELOPE, "signatures", 0, "sig", value="")),
            "not one by the key",
        ),
    ),
    *rows(
        "package",
        "verify: IntegrityError",
        "5 another key",
        ("signature by a stranger who brings his key", with_his_key_beside, "was added"),
    ),
    *rows(
        "package",
        "verify: TrustError",
        "fact 4 one meaning",
        (
            "payload altered",
            wrapped(
                lambda bundle: put(
                    ENVELOPE,
                    "payload",
                    value=base64.b64encode(
                        base64.b64decode(bundle[ENVELOPE]["payload"]) + b" "
                    ).decode(),
                )(bundle)
            ),
            "not one by the key",
        ),
        (
            "payload of another type",
            wrapped(put(ENVELOPE, "payloadType", value="text/plain")),
            "cannot be read",
        ),
        (
            "bundle of another version",
            wrapped(
                put(
                    "mediaType",
                    value="application/vnd.dev.sigstore.bundle+json;version=0.1",
                )
            ),
            "cannot be read",
        ),
        (
            "key id that nobody signed",
            wrapped(put(ENVELOPE, "signatures", 0, "keyid", value="evil")),
            "cannot be read",
        ),
        (
            "field nobody knows in the bundle",
            wrapped(put("note", value="x")),
            "cannot be read",
        ),
        (
            "field nobody knows in the statement",
            signed(put("predicate", "note", value="x")),
            "no OpenSSF",
        ),
        (
            "statement of another predicate",
            signed(put("predicateType", value="https://slsa.dev/provenance/v1")),
            "no OpenSSF",
        ),
        (
            "bundle with a key twice",
            spelt(
                lambda data: data.replace(
                    b'"mediaType":', b'"mediaType":"x","mediaType":', 1
                )
            ),
            "stands twice",
        ),
        (
            "bundle with base64 in a second spelling",
            spelt(lambda data: data.replace(b'"payload":"', b'"payload":"\\n', 1)),
            "base64",
        ),
        (
            "bundle nested a hundred thousand deep",
            after(SIGNATURE, b'{"a":' * 100_000),
            "levels",
        ),
        (
            "root digest of another list",
            signed(put("subject", 0, "digest", "sha256", value="0" * 64)),
            "root digest",
        ),
        (
            "resource listed twice",
            signed(
                lambda statement: (
                    statement["predicate"]["resources"].append(
                        statement["predicate"]["resources"][0]
                    ),
                    rehash(statement),
                )
            ),
            "lists a file twice",
        ),
        (
            "two subjects",
            signed(lambda statement: statement["subject"].append(statement["subject"][0])),
            "no OpenSSF",
        ),
        (
            "a thousand resources",
            signed(
                lambda statement: statement["predicate"].update(
                    resources=[
                        statement["predicate"]["resources"][0] | {"name": f"f{number}"}
                        for number in range(1000)
                    ]
                )
            ),
            "no OpenSSF",
        ),
        (
            "statement that is not UTF-8",
            lambda folder: (folder / "package" / SIGNATURE).write_bytes(
                bundle_of(b"\xff" + payload_in(folder))
            ),
            "no OpenSSF",
        ),
        (
            "statement with a key twice",
            lambda folder: (folder / "package" / SIGNATURE).write_bytes(
                bundle_of(payload_in(folder).replace(b'"name":', b'"name":"x","name":', 1))
            ),
            "stands twice",
        ),
    ),
    *rows(
        "package",
        "verify: TrustError",
        "19 names and paths",
        ("signature that lists a path above", listing("../outside/LICENSE"), "no folders"),
        ("signature that lists an absolute path", listing("/etc/passwd"), "no folders"),
        ("signature that lists a backslash", listing("..\\x"), "no folders"),
        (
            "signature that lists two names alike but for case",
            listing("readme.md"),
            "case alone",
        ),
    ),
    *rows(
        "package",
        "verify: IntegrityError",
        "1 changed bytes",
        ("weights changed after signing", changed(WEIGHTS, flip), "digest"),
        ("config changed after signing", after("adapter_config.json", b"{}"), "bytes"),
        ("card changed after signing", after("README.md", b"# style/tinY\n"), "digest"),
        ("file added after signing", after("extra.json", b"{}"), "was added"),
        (
            "file below .github that is named as weights",
            after("other.safetensors", b""),
            "added",
        ),
        ("digests of two files exchanged", swap, "changed after signing"),
    ),
    *rows(
        "package",
        "verify: InputError",
        "28 floods",
        (
            "bundle above a megabyte",
            spelt(lambda data: data + b" " * (1 << 20)),
            "are read",
        ),
        ("bundle of 60 GB, all hole", made(SIGNATURE, hole), "are read"),
    ),
    *rows(
        "package",
        "validate: LH041",
        "fact 4 covers nothing",
        (
            "signature that covers nothing, before any key is known",
            ignoring(WEIGHTS, "adapter_config.json"),
            "leaves out",
        ),
    ),
    *rows(
        "package",
        "validate: LH042",
        "2 manifest",
        (
            "manifest of another package below a signature",
            lambda folder: (folder / "package/lorahub.json").write_bytes(
                (folder / "package/lorahub.json")
                .read_bytes()
                .replace(b"A tiny adapter.", b"A good adapter.")
            ),
            "not the one that",
        ),
    ),
)
