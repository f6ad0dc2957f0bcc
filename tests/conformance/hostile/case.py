"""A hostile case: how its files are made, which command meets them, what it must say.

Everything is made from one small adapter that is good in every way: rank 2 on one target
of a base of one layer, PEFT's config, a package of it signed with the example key. A case
changes one thing. Making it twice gives the same bytes, but for the claim of a registry.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).parents[3]
PUBLIC = ROOT / "examples/keys/example.key.pub"
PRIVATE = ROOT / "examples/keys/example.key"

TARGET = "model.layers.0.self_attn.q_proj"
A, B = (f"base_model.model.{TARGET}.lora_{side}.weight" for side in "AB")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# Stands in files outside a case's folder. No command may ever print it.
SECRET = "a-secret-of-the-user"

Kind = Literal["adapter", "package", "registry"]


@dataclass(frozen=True, slots=True)
class Case:
    """One hostile adapter, package or registry.

    Attributes:
        name: a phrase; its slug names the folder.
        threat: the row of the threat list it stands for, see docs/hostile.md.
        kind: what the folder holds; `adapter` and `package` name its sub-folder.
        build: fills the case's folder, which holds the sub-folder of the kind already.
        command: which command must refuse it.
        refusal: the id of a rule where the command is `validate`, else an error's type.
        says: what stands in the message.
        code: the exit code.
    """

    name: str
    threat: str
    kind: Kind
    build: Callable[[Path], object]
    command: str
    refusal: str
    says: str
    code: int

    @property
    def slug(self) -> str:
        return "".join(c if c.isalnum() else "-" for c in self.name.lower()).strip("-")

    def arguments(self, folder: Path) -> list[str]:
        """Return the command line that meets the case built in the folder."""
        at, out = str(folder / self.kind), str(folder / "made/out")
        return {
            "validate": ["validate", at],
            "strictly": ["validate", at, "--fail-on", "warning"],
            "inspect": ["inspect", at],
            "verify": ["verify", at, "--key", str(PUBLIC)],
            "sign": ["sign", at, "--key", str(PRIVATE)],
            "pack": [
                *("pack", at, "--base", str(folder / "base"), "--out", out),
                *("--name", "style/tiny", "--version", "1.0.0", "--license", "MIT"),
                *("--task", "text-generation/verse"),
            ],
            "convert": ["convert", at, "--to", "kohya", "--out", out],
            "pull": ["pull", "style/tiny", "--registry", at, "--out", out],
            "check": ["registry", "check", at],
        }[self.command]


EXIT_CODES = {
    "InputError": 2,
    "DocumentError": 2,
    "TensorFileError": 2,
    "FormatError": 2,
    "IntegrityError": 4,
    "TrustError": 4,
    "NotFoundError": 5,
    "StoreError": 6,
}


def case(
    name: str,
    threat: str,
    kind: Kind,
    build: Callable[[Path], object],
    expected: str,
    says: str,
) -> Case:
    """Return a case; `expected` is `command: what it refuses with`."""
    command, _, refusal = expected.partition(": ")
    code = 1 if command in ("validate", "strictly", "check") else EXIT_CODES[refusal]
    return Case(name, threat, kind, build, command, refusal, says, code)


# ── the good adapter ─────────────────────────────────────────────────────────────────


def entries(dtype: str = "F32") -> dict[str, Any]:
    """Return the header of the adapter: A (2, 4), then B (4, 2)."""
    return {
        A: {"dtype": dtype, "shape": [2, 4], "data_offsets": [0, 32]},
        B: {"dtype": dtype, "shape": [4, 2], "data_offsets": [32, 64]},
    }


def numbers() -> bytes:
    """Return the data of the adapter: sixteen float32 numbers from 0 to 15/16."""
    import struct

    return struct.pack("<16f", *(number / 16 for number in range(16)))


def config(**changes: Any) -> dict[str, Any]:
    plain = {
        "base_model_name_or_path": "tiny-lab/tiny",
        "lora_alpha": 4,
        "peft_type": "LORA",
        "r": 2,
        "target_modules": ["q_proj"],
        "task_type": "CAUSAL_LM",
    }
    return plain | changes


def safetensors(
    header: object, data: bytes | None = None, length: int | None = None
) -> bytes:
    """Return a file with this header, a value or the text itself."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if length is None else length
    return length.to_bytes(8, "little") + text + (numbers() if data is None else data)


def fill_adapter(folder: Path) -> Path:
    """Make `adapter/`, a folder as PEFT saves it."""
    made = folder / "adapter"
    made.mkdir(parents=True)
    (made / CONFIG).write_text(json.dumps(config(), indent=2))
    (made / WEIGHTS).write_bytes(safetensors(entries()))
    return made


def fill_package(folder: Path) -> Path:
    """Make `package/`, the adapter packed and signed with the example key."""
    from tests import packages

    packages.package(folder / "package", key=key())
    return folder / "package"


def fill_registry(folder: Path) -> Path:
    """Make `registry/`, the package published; its namespace is claimed by the key."""
    from lora_hub.package.package import open_package
    from lora_hub.registry.publish import push
    from lora_hub.registry.registry import init
    from lora_hub.registry.trust import TrustStore

    made = init(folder / "registry", "tiny-registry")
    package = open_package(fill_package(folder))
    push(package, made, public_key=PUBLIC.read_bytes(), trust=TrustStore())
    return folder / "registry"


def fill_base(folder: Path) -> Path:
    """Make `base/`, a checkpoint of the one tensor that the adapter changes."""
    made = folder / "base"
    made.mkdir()
    entry = {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}
    (made / "model.safetensors").write_bytes(safetensors({f"{TARGET}.weight": entry}))
    (made / "config.json").write_text('{"model_type": "llama"}')
    return made


FILL: Mapping[Kind, Callable[[Path], Path]] = {
    "adapter": fill_adapter,
    "package": fill_package,
    "registry": fill_registry,
}


def key(seed: int = 0) -> Any:
    """Return the example's private key, or for another seed a stranger's."""
    from cryptography.hazmat.primitives.asymmetric import ec

    from lora_hub.signing import keys

    if seed:
        return ec.derive_private_key(seed, ec.SECP256R1())
    return keys.private_key(PRIVATE.read_bytes())


# ── what cases are made with ─────────────────────────────────────────────────────────


def weights(data: bytes) -> Callable[[Path], object]:
    """Return the builder of an adapter with this file of weights."""
    return lambda folder: (folder / "adapter" / WEIGHTS).write_bytes(data)


def configured(text: bytes | None = None, **changes: Any) -> Callable[[Path], object]:
    """Return the builder of an adapter with this config."""
    data = json.dumps(config(**changes)).encode() if text is None else text
    return lambda folder: (folder / "adapter" / CONFIG).write_bytes(data)


def rows(kind: Kind, expected: str, threat: str, *cases: tuple[Any, ...]) -> Iterator[Case]:
    """Yield cases that share a threat and a refusal: (name, builder, message)."""
    for name, build, says in cases:
        yield case(name, threat, kind, build, expected, says)
