"""The two published packages before other people's tools, and before a forger.

`model_signing` 1.1.1 and PEFT as installed are the oracles: the first must accept our
signatures (and ours accepts its), the second must load the folders as they are.
"""

import contextlib
import io
import subprocess
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_hub.cli.main import run
from lora_hub.public.find import open_registry
from lora_hub.refs import parse
from lora_hub.registry.fetch import open_published
from lora_hub.registry.resolve import resolve

ROOT = Path(__file__).parents[2]
KEY = ROOT / "examples/keys/example.key"
PUBLIC = ROOT / "examples/keys/example.key.pub"
MODEL_SIGNING = Path(sysconfig.get_path("scripts"), "model_signing")
NAMES = ("style/shakespeare", "style/milton")
TOKENS = [[1, 28, 565, 33, 284, 2046], [4, 5, 6, 7, 8, 9]]


@pytest.fixture(params=NAMES, ids=lambda name: name.partition("/")[2])
def package(request, tmp_path):
    """A published package as a folder of its own."""
    return unpacked(request.param, tmp_path / "package")


def unpacked(name: str, folder: Path) -> Path:
    registry = open_registry(ROOT / "registry")
    published = open_published(resolve(parse(name), registry), registry)
    folder.mkdir(parents=True)
    for file in published.names:
        (folder / file).write_bytes(published.read(file))
    return folder


def verify(folder: Path, key: Path = PUBLIC) -> int:
    return run(["verify", str(folder), "--key", str(key)])


def test_model_signing_accepts_our_signature(package):
    command = [
        MODEL_SIGNING,
        "verify",
        "key",
        package,
        "--signature",
        package / "model.sig",
    ]

    result = subprocess.run(
        [*command, "--public_key", PUBLIC], capture_output=True, text=True
    )

    assert "Verification succeeded" in result.stdout + result.stderr


def test_we_accept_the_signature_of_model_signing(package, capsys):
    signature = package / "model.sig"
    ours = signature.read_bytes()
    signature.unlink()
    command = [MODEL_SIGNING, "sign", "key", package, "--private_key", KEY]
    subprocess.run([*command, "--signature", signature], check=True, capture_output=True)

    assert signature.read_bytes() != ours
    assert verify(package) == 0


def test_an_added_file_is_named(package, capsys):
    (package / "extra.json").write_text("{}")

    assert verify(package) == 4
    assert "extra.json: the file was added" in capsys.readouterr().err


def test_a_missing_file_is_named(package, capsys):
    (package / "README.md").unlink()

    assert verify(package) == 4
    assert "README.md: the file is missing" in capsys.readouterr().err


def test_a_removed_signature_is_named(package, capsys):
    (package / "model.sig").unlink()

    assert verify(package) == 4
    assert "not signed" in capsys.readouterr().err


def test_another_key_is_named(package, tmp_path, capsys):
    run(["keygen", "--out", str(tmp_path / "other.key")])
    assert run(["sign", str(package), "--key", str(tmp_path / "other.key")]) == 0

    assert verify(package) == 4
    assert "signed with another key" in capsys.readouterr().err


@pytest.fixture(scope="module", params=NAMES, ids=lambda name: name.partition("/")[2])
def sound(request, tmp_path_factory):
    """A published package that every test leaves as it was."""
    return unpacked(request.param, tmp_path_factory.mktemp("sound") / "package")


@settings(max_examples=80, deadline=None, database=None)
@given(data=st.data())
def test_any_flipped_byte_of_any_file_is_refused(sound, data):
    file = data.draw(st.sampled_from(sorted(path.name for path in sound.iterdir())))
    position = data.draw(st.integers(0, (sound / file).stat().st_size - 1))
    flip = data.draw(st.integers(1, 255))

    said = io.StringIO()
    with flipped(sound / file, position, flip), contextlib.redirect_stderr(said):
        code = verify(sound)

    assert code == 4, said.getvalue()
    # The sentence names the file, or the package where it is the signature that is off.
    assert file in said.getvalue() or file == "model.sig"
    assert "changed" in said.getvalue() or "sign" in said.getvalue()


@contextlib.contextmanager
def flipped(path, position, flip):
    """Change one byte of a file, and change it back."""
    with path.open("r+b", buffering=0) as file:

        def change():
            file.seek(position)
            byte = file.read(1)[0] ^ flip
            file.seek(position)
            file.write(bytes([byte]))

        change()
        try:
            yield
        finally:
            change()


@pytest.mark.base
def test_peft_loads_the_package_as_it_is(package):
    import peft
    import torch
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(
        ROOT / "build/base", dtype=torch.float32
    ).eval()
    source = ROOT / "tests/assets/adapters"
    (original,) = (
        folder
        for folder in source.iterdir()
        if folder.is_dir()
        and (folder / "adapter_model.safetensors").stat().st_size
        == (package / "adapter_model.safetensors").stat().st_size
    )
    tokens = torch.tensor(TOKENS)

    with torch.inference_mode():
        bare = base(tokens).logits
        model = peft.PeftModel.from_pretrained(base, package, adapter_name="package")
        logits = model(tokens).logits
        model.load_adapter(original, adapter_name="original")
        model.set_adapter("original")
        expected = model(tokens).logits

    assert torch.equal(logits, expected)
    assert not torch.allclose(logits, bare)
