"""Our bundles under our own verifier: which sentence for which attack."""

import base64
import json

import pytest

from lora_hub import digest
from lora_hub.errors import IntegrityError, TrustError
from lora_hub.signing import envelope, keys, statement
from lora_hub.signing.sign import sign
from lora_hub.signing.verify import verify

KEY = keys.private_key(keys.generate())
PUBLIC = keys.public_pem(KEY)
FILES = {
    name: digest.of_bytes(name.encode())
    for name in (
        "lorahub.json",
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    )
}
BUNDLE = sign(FILES, subject="style/tiny", key=KEY)


def signed(payload: bytes, key=KEY, hint=None) -> bytes:
    """A bundle whose signature is right, over any payload."""
    return envelope.build(
        envelope.Envelope(
            payload, keys.sign(key, envelope.pae(payload)), hint or keys.hint(key)
        )
    )


def altered(change) -> bytes:
    """A rightly signed bundle over a statement changed by `change(document)`."""
    document = json.loads(statement.build(FILES, subject="style/tiny"))
    change(document)
    return signed(json.dumps(document).encode())


def resealed(change) -> bytes:
    """Our bundle with the JSON around the signature changed."""
    document = json.loads(BUNDLE)
    change(document)
    return json.dumps(document).encode()


def test_accepts_what_it_signed():
    signer = verify(BUNDLE, FILES, [PUBLIC])

    assert signer.public_pem == PUBLIC
    assert signer.fingerprint == keys.fingerprint(KEY)


def test_picks_the_signer_among_several_keys():
    other = keys.public_pem(keys.private_key(keys.generate()))

    assert verify(BUNDLE, FILES, [other, PUBLIC]).hint == keys.hint(KEY)


def test_lists_files_in_code_point_order_whatever_order_they_came_in():
    backwards = dict(reversed(FILES.items()))

    assert sign(backwards, subject="style/tiny", key=KEY) == BUNDLE


def test_refuses_to_sign_what_is_no_package():
    with pytest.raises(TrustError, match=r"covers too little: 'lorahub.json'"):
        sign({"adapter_config.json": digest.of_bytes(b"")}, subject="x", key=KEY)


def test_says_that_the_signature_is_gone():
    with pytest.raises(TrustError, match="not signed, or its signature was removed"):
        verify(None, FILES, [PUBLIC])


def test_says_which_other_key_signed():
    other = keys.private_key(keys.generate())

    with pytest.raises(TrustError, match="signed with another key") as caught:
        verify(sign(FILES, subject="x", key=other), FILES, [PUBLIC])

    assert keys.hint(other) in caught.value.problem
    assert keys.hint(KEY) in caught.value.problem


def test_says_that_no_key_is_trusted():
    with pytest.raises(TrustError, match="no key is trusted"):
        verify(BUNDLE, FILES, [])


def test_refuses_the_hint_of_one_key_over_the_signature_of_another():
    other = keys.private_key(keys.generate())
    forged = signed(statement.build(FILES, subject="x"), key=other, hint=keys.hint(KEY))

    with pytest.raises(TrustError, match="not one by the key"):
        verify(forged, FILES, [PUBLIC])


@pytest.mark.parametrize("name", FILES)
def test_names_the_changed_file(name):
    with pytest.raises(IntegrityError, match="changed after signing") as caught:
        verify(BUNDLE, FILES | {name: digest.of_bytes(b"other")}, [PUBLIC])

    assert caught.value.where == name


@pytest.mark.parametrize("name", FILES)
def test_names_the_missing_file(name):
    rest = {key: value for key, value in FILES.items() if key != name}

    with pytest.raises(IntegrityError, match="signed and is missing") as caught:
        verify(BUNDLE, rest, [PUBLIC])

    assert caught.value.where == name


def test_names_the_added_file():
    with pytest.raises(IntegrityError, match="added after signing") as caught:
        verify(BUNDLE, FILES | {"extra.txt": digest.of_bytes(b"")}, [PUBLIC])

    assert caught.value.where == "extra.txt"


def test_refuses_added_weights_as_not_covered():
    with pytest.raises(TrustError, match=r"covers too little: 'more.safetensors'"):
        verify(BUNDLE, FILES | {"more.safetensors": digest.of_bytes(b"")}, [PUBLIC])


def without(name):
    def change(document):
        resources = document["predicate"]["resources"]
        resources[:] = [entry for entry in resources if entry["name"] != name]
        rehash(document)

    return change


def renamed(old, new):
    def change(document):
        for entry in document["predicate"]["resources"]:
            entry["name"] = new if entry["name"] == old else entry["name"]

    return change


def rehash(document):
    digests = [
        bytes.fromhex(entry["digest"]) for entry in document["predicate"]["resources"]
    ]
    root = digest.of_bytes(b"".join(digests))
    document["subject"][0]["digest"]["sha256"] = root.removeprefix("sha256:")


def put(*path, value):
    def change(document):
        for step in path[:-1]:
            document = document[step]
        document[path[-1]] = value

    return change


def twice(document):
    document["predicate"]["resources"] *= 2
    rehash(document)


def many(document):
    (first, *_) = document["predicate"]["resources"]
    document["predicate"]["resources"] = [first | {"name": f"f{i}"} for i in range(257)]


SERIALIZATION = ("predicate", "serialization")

# Every one carries a valid signature of a trusted key.
STATEMENTS = {
    "weights left out of the list": (
        without("adapter_model.safetensors"),
        "covers too little: 'adapter_model.safetensors'",
    ),
    "manifest left out of the list": (without("lorahub.json"), "covers too little"),
    "config left out of the list": (without("adapter_config.json"), "covers too little"),
    "weights ignored": (
        put(
            *SERIALIZATION, "ignore_paths", value=["model.sig", "adapter_model.safetensors"]
        ),
        "leaves out 'adapter_model.safetensors'",
    ),
    "folder above ignored": (
        put(*SERIALIZATION, "ignore_paths", value=["model.sig", "."]),
        "leaves out '.'",
    ),
    "symbolic links followed": (
        put(*SERIALIZATION, "allow_symlinks", value=True),
        "symbolic links",
    ),
    "shards": (put(*SERIALIZATION, "method", value="shards"), "'shards'"),
    "blake3": (put(*SERIALIZATION, "hash_type", value="blake3"), "'blake3'"),
    "resource of another hash": (
        put("predicate", "resources", 0, "algorithm", value="blake3"),
        "'blake3'",
    ),
    "no subject": (put("subject", value=[]), "length >= 1"),
    "root digest of other files": (
        put("subject", 0, "digest", "sha256", value="0" * 64),
        "root digest",
    ),
    "file listed twice": (twice, "lists a file twice"),
    "file in a folder": (renamed("README.md", "docs/README.md"), "has no folders"),
    "file on another drive": (renamed("README.md", "..\\README.md"), "has no folders"),
    "names that differ in case": (
        renamed("README.md", "LORAHUB.JSON"),
        "differ in case alone",
    ),
    "more than 256 files": (many, "length <= 256"),
    "another predicate": (
        put("predicateType", value="https://model_signing/Digests/v0.1"),
        "Digests/v0.1",
    ),
    "key beyond the schema": (
        put("predicate", "note", value="hello"),
        "unknown field `note`",
    ),
}


@pytest.mark.parametrize("name", STATEMENTS)
def test_refuses_rightly_signed_statement(name):
    change, problem = STATEMENTS[name]

    with pytest.raises(TrustError) as caught:
        verify(altered(change), FILES, [PUBLIC])

    assert problem in caught.value.problem


def keyless(document):
    document["verificationMaterial"] = {"certificate": {"rawBytes": ""}, "tlogEntries": []}


def second_spelling(document):
    signature = document["dsseEnvelope"]["signatures"][0]
    raw = base64.b64decode(signature["sig"])
    padded = base64.b64encode(raw).decode()
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    body = padded.rstrip("=")
    last = alphabet[alphabet.index(body[-1]) ^ 1]
    signature["sig"] = body[:-1] + last + "=" * (len(padded) - len(body))


ENVELOPES = {
    "certificate": (keyless, "signed with a certificate"),
    "no hint": (put("verificationMaterial", "publicKey", value={}), "`hint`"),
    "empty hint": (put("verificationMaterial", "publicKey", "hint", value=""), "hint"),
    "older media type": (
        put("mediaType", value="application/vnd.dev.sigstore.bundle+json;version=0.1"),
        "mediaType",
    ),
    "no signature": (put("dsseEnvelope", "signatures", value=[]), "length >= 1"),
    "two signatures": (
        put("dsseEnvelope", "signatures", value=[{"sig": "", "keyid": ""}] * 2),
        "length <= 1",
    ),
    "not base64": (put("dsseEnvelope", "signatures", 0, "sig", value="%%"), "not base64"),
    "not DER": (
        put("dsseEnvelope", "signatures", 0, "sig", value="AAAA"),
        "not one by the key",
    ),
    "another payload type": (put("dsseEnvelope", "payloadType", value="text"), "'text'"),
    "unknown key": (put("extra", value=1), "unknown field `extra`"),
    "log entries": (put("verificationMaterial", "tlogEntries", value=[1]), "length <= 0"),
}


@pytest.mark.parametrize("name", ENVELOPES)
def test_refuses_envelope(name):
    change, problem = ENVELOPES[name]

    with pytest.raises(TrustError) as caught:
        verify(resealed(change), FILES, [PUBLIC])

    assert problem in caught.value.problem


BYTES = {
    "empty": (b"", "not JSON"),
    "array": (b"[]", "expected an object"),
    "key twice": (BUNDLE.replace(b"{", b'{"mediaType":"x",', 1), "stands twice"),
    "too large": (BUNDLE + b" " * (1 << 20), "at most 1048576"),
    "deep": (b'{"a":' * 40 + b"1" + b"}" * 40, "levels deep"),
    "pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "LFS pointer",
    ),
}


@pytest.mark.parametrize("name", BYTES)
def test_refuses_bundle_bytes(name):
    bundle, problem = BYTES[name]

    with pytest.raises(TrustError, match=problem) as caught:
        verify(bundle, FILES, [PUBLIC], where="pkg")

    assert caught.value.where == "pkg/model.sig"


def test_refuses_base64_in_a_second_spelling():
    # DER lengths vary, so look for a signature whose base64 is padded: only there can the
    # last character be spelt in two ways.
    for number in range(64):
        bundle = sign(FILES, subject=f"s{number}", key=KEY)
        text = json.loads(bundle)["dsseEnvelope"]["signatures"][0]["sig"]
        if text.endswith("="):
            break
    document = json.loads(bundle)
    second_spelling(document)
    spelt = document["dsseEnvelope"]["signatures"][0]["sig"]
    assert base64.b64decode(spelt) == base64.b64decode(text)

    with pytest.raises(TrustError, match="second spelling"):
        verify(json.dumps(document).encode(), FILES, [PUBLIC])
