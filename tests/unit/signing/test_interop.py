"""Both ways with model_signing 1.1.1, which shares no code with ours."""

import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from lora_hub import digest
from lora_hub.errors import TrustError
from lora_hub.signing import keys
from lora_hub.signing.sign import sign
from lora_hub.signing.verify import verify

TOOL = Path(sys.executable).with_name("model_signing")
CURVES = {"P-256": ec.SECP256R1(), "P-384": ec.SECP384R1(), "P-521": ec.SECP521R1()}


@pytest.fixture
def package(tmp_path):
    folder = tmp_path / "package"
    folder.mkdir()
    for name in ("lorahub.json", "adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_text(f"content of {name}")
    return folder


@pytest.fixture(params=CURVES)
def key(request, tmp_path):
    made = ec.generate_private_key(CURVES[request.param])
    pem = made.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    (tmp_path / "key").write_bytes(pem)
    (tmp_path / "key.pub").write_bytes(keys.public_pem(made))
    return keys.private_key(pem)


def digests(folder: Path) -> dict[str, str]:
    return {
        path.name: digest.of_bytes(path.read_bytes())
        for path in folder.iterdir()
        if path.is_file() and path.name != "model.sig" and not path.name.startswith(".")
    }


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [TOOL, *map(str, arguments)], capture_output=True, text=True, check=False
    )


def test_model_signing_verifies_our_bundle(package, key):
    bundle = sign(digests(package), subject="style/tiny", key=key)
    (package / "model.sig").write_bytes(bundle)

    result = run(
        *("verify", "key", package, "--signature", package / "model.sig"),
        *("--public_key", package.parent / "key.pub"),
    )

    assert "Verification succeeded" in result.stdout
    assert result.returncode == 0


def test_model_signing_refuses_our_bundle_over_changed_weights(package, key):
    bundle = sign(digests(package), subject="style/tiny", key=key)
    (package / "model.sig").write_bytes(bundle)
    (package / "adapter_model.safetensors").write_text("other content")

    result = run(
        *("verify", "key", package, "--signature", package / "model.sig"),
        *("--public_key", package.parent / "key.pub"),
    )

    assert result.returncode == 1


def test_we_verify_the_bundle_of_model_signing(package, key):
    (package / ".gitattributes").write_text("* -text")
    result = run(
        *("sign", "key", package, "--signature", package / "model.sig"),
        *("--private_key", package.parent / "key"),
    )
    assert result.returncode == 0, result.stderr

    signer = verify(
        (package / "model.sig").read_bytes(),
        digests(package),
        [(package.parent / "key.pub").read_bytes()],
    )

    assert signer.hint == keys.hint(key)


def test_we_refuse_the_bundle_of_model_signing_that_ignores_the_weights(package, tmp_path):
    (tmp_path / "key").write_bytes(keys.generate())
    public = keys.public_pem(keys.private_key((tmp_path / "key").read_bytes()))
    (tmp_path / "key.pub").write_bytes(public)
    run(
        *("sign", "key", package, "--signature", package / "model.sig"),
        *("--ignore-paths", package / "adapter_model.safetensors"),
        *("--private_key", tmp_path / "key"),
    )
    theirs = run(
        *("verify", "key", package, "--signature", package / "model.sig"),
        *("--public_key", tmp_path / "key.pub"),
    )
    assert "Verification succeeded" in theirs.stdout

    with pytest.raises(TrustError, match="leaves out"):
        verify((package / "model.sig").read_bytes(), digests(package), [public])
