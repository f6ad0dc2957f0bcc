"""Keys as PEM text."""

import hashlib
import subprocess

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from lora_hub.errors import InputError
from lora_hub.signing import keys


def pem_of(key, encryption=None):
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        encryption or serialization.NoEncryption(),
    )


def test_hint_is_what_sha256sum_prints_for_the_public_file(tmp_path):
    key = keys.private_key(keys.generate())
    path = tmp_path / "release.pub"
    path.write_bytes(keys.public_pem(key))

    printed = subprocess.run(["sha256sum", path], capture_output=True, text=True).stdout

    assert printed.split()[0] == keys.hint(key)
    assert keys.fingerprint(key) == f"SHA256:{keys.hint(key)}"


def test_hint_is_the_same_for_both_halves_and_for_other_line_ends():
    key = keys.private_key(keys.generate())
    windows = keys.public_pem(key).replace(b"\n", b"\r\n")

    assert keys.hint(keys.public_key(windows)) == keys.hint(key)
    assert hashlib.sha256(windows).hexdigest() != keys.hint(key)


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()])
def test_signs_the_same_bytes_twice_and_knows_its_own(curve):
    key = keys.private_key(pem_of(ec.generate_private_key(curve)))
    public = keys.public_key(keys.public_pem(key))

    signature = keys.sign(key, b"message")

    assert signature == keys.sign(key, b"message")
    assert keys.is_signed(public, signature, b"message")
    assert not keys.is_signed(public, signature, b"massage")


def test_openssl_verifies_what_a_new_key_signs(tmp_path):
    key = keys.private_key(keys.generate())
    (tmp_path / "pub").write_bytes(keys.public_pem(key))
    (tmp_path / "sig").write_bytes(keys.sign(key, b"message"))
    (tmp_path / "message").write_bytes(b"message")

    run = subprocess.run(
        ["openssl", "dgst", "-sha256", "-verify", "pub", "-signature", "sig", "message"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )

    assert run.stdout.strip() == "Verified OK"


PRIVATE = {
    "empty": (b"", "no private key"),
    "text": (b"hello", "no private key"),
    "ed25519": (pem_of(ed25519.Ed25519PrivateKey.generate()), "Ed25519PrivateKey"),
    "secp256k1": (pem_of(ec.generate_private_key(ec.SECP256K1())), "secp256k1"),
    "encrypted": (
        pem_of(
            ec.generate_private_key(ec.SECP256R1()),
            serialization.BestAvailableEncryption(b"word"),
        ),
        "password",
    ),
    "public": (keys.public_pem(keys.private_key(keys.generate())), "no private key"),
}


@pytest.mark.parametrize("name", PRIVATE)
def test_refuses_what_is_no_private_key_of_ours(name):
    pem, problem = PRIVATE[name]

    with pytest.raises(InputError, match=problem) as caught:
        keys.private_key(pem, where="my.key")

    assert caught.value.where == "my.key"
    assert caught.value.hint


PUBLIC = {
    "empty": (b"", "no public key"),
    "private": (keys.generate(), "this is a private key"),
    "ed25519": (
        ed25519.Ed25519PrivateKey.generate()
        .public_key()
        .public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        ),
        "Ed25519PublicKey",
    ),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_refuses_what_is_no_public_key_of_ours(name):
    pem, problem = PUBLIC[name]

    with pytest.raises(InputError, match=problem):
        keys.public_key(pem)
