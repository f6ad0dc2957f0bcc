"""Thirty and more mistakes a user can make on the journey, each met with one line.

Every mistake gives the exit code of its kind, one line that says where and what, and a
hint where something can be done; never a traceback, never a half-made folder.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from lora_hub.cli.main import run
from tests.builders import tiny_adapter, tiny_base, tiny_model

PACK = ["--task", "text-generation", "--license", "MIT"]


@dataclass(frozen=True, slots=True)
class World:
    """A user's folders: a base, an adapter, keys, a signed package, a registry."""

    folder: Path

    def __truediv__(self, name: str) -> str:
        return str(self.folder / name)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    tiny_base(folder / "base")
    tiny_base(folder / "other-base", seed=7)
    tiny_base(folder / "short-base", layers=1)
    tiny_adapter(folder / "adapter")
    tiny_adapter(folder / "wide", model=tiny_model(hidden=32))
    tiny_adapter(folder / "dora", use_dora=True)
    tiny_adapter(folder / "pickled")
    (folder / "pickled" / "training_args.bin").write_bytes(b"\x80\x04.")
    tiny_adapter(folder / "liar")
    config = json.loads((folder / "liar/adapter_config.json").read_text())
    (folder / "liar/adapter_config.json").write_text(json.dumps(config | {"r": 3}))
    tiny_adapter(folder / "pointer")
    (folder / "pointer/adapter_model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    )
    (folder / "empty").mkdir()
    (folder / "full").mkdir()
    (folder / "full/mine.txt").write_text("keep me")
    for name in ("my", "other"):
        assert run(["keygen", "--out", str(folder / f"{name}.key")]) == 0
    for name, version, base in (
        ("package", "1.0.0", "base"),
        ("changed", "1.0.0", "base"),
        ("cousin", "2.0.0", "other-base"),
    ):
        said = ["--name", "me/ad", "--version", version, "--summary", name, *PACK]
        places = ["--base", str(folder / base), "--out", str(folder / name)]
        assert run(["pack", str(folder / "adapter"), *said, *places]) == 0
    shutil.copytree(folder / "package", folder / "unsigned")
    shutil.copytree(folder / "package", folder / "forged")
    for name, key in (("package", "my"), ("changed", "my"), ("forged", "other")):
        assert run(["sign", str(folder / name), "--key", str(folder / f"{key}.key")]) == 0
    assert run(["registry", "init", str(folder / "registry"), "--name", "test"]) == 0
    push = ["push", str(folder / "package"), "--registry", str(folder / "registry")]
    assert run([*push, "--key", str(folder / "my.key.pub")]) == 0
    return folder


@pytest.fixture
def world(original, tmp_path, capsys):
    shutil.copytree(original, tmp_path / "w")
    capsys.readouterr()
    return World(tmp_path / "w")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def prepare(world: World, name: str) -> None:
    """Bring about what a case needs beyond the common world."""
    if name == "flipped":
        flip(Path(world / "package/adapter_model.safetensors"))
    elif name == "added":
        Path(world / "package/more.txt").write_text("x")
    elif name == "damaged blob":
        largest = max(
            Path(world / "registry/blobs").rglob("?" * 64), key=lambda p: p.stat().st_size
        )
        flip(largest)
    elif name == "changed key":
        assert run(["trust", "add", "me", world / "other.key.pub"]) == 0
    elif name == "broken event":
        flip(Path(world / "registry/index/me/ad/000001.json"))


PACKED = [
    "--name",
    "me/xx",
    "--version",
    "1.0.0",
    "--base",
    "@base",
    "--out",
    "@out",
    *PACK,
]


def packed(**changed: str) -> list[str]:
    """Return the arguments of a good `pack` with some of them changed."""
    arguments = list(PACKED)
    for option, value in changed.items():
        arguments[arguments.index(f"--{option}") + 1] = value
    return arguments


REG = ["--registry", "@registry"]

# What it is: the command line (@ stands for the world's folder), exit code, and a part of
# what is said.
ERRORS = {
    "a misspelt command": (["pakc"], 2, "Did you mean 'pack'"),
    "a missing option": (["pack", "@adapter"], 2, "Missing option"),
    "a source that is not there": (["pack", "@none", *packed()], 2, "no such folder"),
    "an empty source": (["pack", "@empty", *packed()], 2, "no adapter is here"),
    "a name in capitals": (["pack", "@adapter", *packed(name="Me/X")], 2, "namespace/name"),
    "a version of two parts": (
        ["pack", "@adapter", *packed(version="1.0")],
        2,
        "no version",
    ),
    "no such task": (["pack", "@adapter", *packed(task="poetry")], 2, "is no task"),
    "no such licence": (["pack", "@adapter", *packed(license="do what")], 2, "licen"),
    "a base that is none": (["pack", "@adapter", *packed(base="@empty")], 2, "safetensors"),
    "a base of other shapes": (["pack", "@wide", *packed()], 3, "do not fit the base"),
    "a base with fewer layers": (
        ["pack", "@adapter", *packed(base="@short-base")],
        3,
        "do not fit the base",
    ),
    "a folder that is taken": (["pack", "@adapter", *packed(out="@full")], 6, "not empty"),
    "a pickle": (["pack", "@pickled", *packed()], 2, "training_args.bin"),
    "a sum of a DoRA adapter": (
        ["compose", "@dora=0.5", "--out", "@out"],
        2,
        "is a DoRA adapter, whose weighted sum needs the base's weight",
    ),
    "a rank that lies": (["pack", "@liar", *packed()], 2, "rank"),
    "a Git LFS pointer": (["pack", "@pointer", *packed()], 2, "Git LFS pointer"),
    "a key that is not there": (
        ["sign", "@package", "--key", "@no.key"],
        2,
        "cannot be read",
    ),
    "a public key to sign with": (
        ["sign", "@package", "--key", "@my.key.pub"],
        2,
        "private key",
    ),
    "a key that exists": (["keygen", "--out", "@my.key"], 6, "never overwritten"),
    "nothing to verify": (["verify", "@empty", "--key", "@my.key.pub"], 2, "no package"),
    "no signature": (["verify", "@unsigned", "--key", "@my.key.pub"], 4, "not signed"),
    "another key": (["verify", "@package", "--key", "@other.key.pub"], 4, "another key"),
    "nobody trusted": (["verify", "@package"], 4, "no key is trusted"),
    "flipped": (
        ["verify", "@package", "--key", "@my.key.pub"],
        4,
        "adapter_model.safetensors",
    ),
    "added": (["verify", "@package", "--key", "@my.key.pub"], 4, "more.txt"),
    "no registry named": (["push", "@package"], 2, "no registry was named"),
    "a folder that is no registry": (
        ["push", "@package", "--registry", "@empty"],
        5,
        "holds no registry",
    ),
    "an unsigned push": (["push", "@unsigned", *REG], 4, "not signed"),
    "a push by another key": (["push", "@forged", *REG], 4, "another key"),
    "other bytes, same version": (["push", "@changed", *REG], 6, "with other bytes"),
    "no such name": (["pull", "me/ax", *REG], 5, "me/ad"),
    "no such version": (["pull", "me/ad@2.0.0", *REG], 5, "no version satisfies"),
    "no such range": (["show", "me/ad@~=3.0", *REG], 5, "versions: 1.0.0"),
    "a misspelt reference": (["pull", "ad", *REG], 2, "namespace/name"),
    "changed key": (["pull", "me/ad", *REG], 4, "keys of the namespace 'me' changed"),
    "damaged blob": (["pull", "me/ad", *REG], 4, "digest"),
    "broken event": (["pull", "me/ad", *REG], 4, "the registry calls the package"),
    "a yank of nothing": (
        ["yank", "me/ad@9.0.0", "--reason", "x", "--key", "@my.key", *REG],
        5,
        "never published",
    ),
    "a yank by another key": (
        ["yank", "me/ad@1.0.0", "--reason", "x", "--key", "@other.key", *REG],
        4,
        "does not sign for",
    ),
    "a yank of no exact version": (
        ["yank", "me/ad", "--reason", "x", "--key", "@my.key", *REG],
        2,
        "no version",
    ),
    "a method that is none": (
        ["compose", "me/ad", "--method", "mix", "--out", "@out", *REG],
        2,
        "methods: linear, cat",
    ),
    "a weight that is none": (
        ["compose", "me/ad=much", "--out", "@out", *REG],
        2,
        "no weight",
    ),
    "two bases": (
        ["compose", "@package=1", "@cousin=1", "--out", "@out"],
        2,
        "base",
    ),
    "a merge with another base": (
        ["merge", "me/ad", "--base", "@other-base", "--out", "@out", *REG],
        3,
        "other weights",
    ),
    "a merge onto something": (
        ["merge", "me/ad", "--base", "@base", "--out", "@full", *REG],
        6,
        "not empty",
    ),
    "a base without tokenizer": (["run", "--base", "@base", "Hello"], 2, "tokenizer"),
    "a run without a base": (["run", "--base", "@empty", "Hello"], 2, "safetensors"),
    "a path that is not there": (["validate", "@none"], 2, "no such"),
    "a pin against a pin": (["trust", "rotate", "nobody", "@my.key.pub"], 5, "no pin"),
    "a registry of another name": (
        ["registry", "init", "@registry", "--name", "elsewhere"],
        2,
        "registry already",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_mistake_is_met_with_one_line_and_its_exit_code(case, world, capsys):
    arguments, code, says = ERRORS[case]
    prepare(world, case)
    capsys.readouterr()

    found = run(
        [
            text.replace("@", world / "" + "/", 1) if text[:1] == "@" else text
            for text in arguments
        ]
    )

    captured = capsys.readouterr()
    assert found == code, captured.err
    assert says in captured.err
    assert "Traceback" not in captured.err
    lines = captured.err.replace("Usage:", "\nUsage:").splitlines()
    said = [
        line
        for line in lines
        if not line.startswith(("  hint: ", "note: ", "Usage:", "Try "))
    ]
    assert len([line for line in said if line.strip()]) == 1, captured.err
    assert captured.out == ""
    assert not Path(world / "out").exists()
    assert Path(world / "full/mine.txt").read_text() == "keep me"


def test_there_are_at_least_thirty():
    assert len(ERRORS) >= 30
