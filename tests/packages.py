"""Small real packages for tests of signing and publishing, made without torch.

The adapter has one target of rank 2; nothing checks it against a base here, so the base's
digests are those of nothing.
"""

import json
import struct
from pathlib import Path

from lora_hub import digest
from lora_hub.formats.detect import open_adapter
from lora_hub.manifest import codec
from lora_hub.manifest.document import (
    AdapterInfo,
    Base,
    BaseConfig,
    BaseTarget,
    File,
    Manifest,
    Task,
)
from lora_hub.package import derived, layout
from lora_hub.package.package import Package, open_package
from lora_hub.signing import keys
from lora_hub.signing.sign import sign

KEY = keys.private_key(keys.generate())
PUBLIC = keys.public_pem(KEY)

TARGET = "model.layers.0.self_attn.q_proj"
CREATED = "2026-11-23T00:00:00Z"


def another_key():
    """Return a new private key."""
    return keys.private_key(keys.generate())


def package(
    folder: Path,
    *,
    name: str = "style/tiny",
    version: str = "1.0.0",
    key=KEY,
    seed: int = 0,
    summary: str = "A tiny adapter.",
    task: str = "text-generation/verse",
    base: str = "base",
) -> Package:
    """Fill the folder with a package signed with the key (None: unsigned); return it."""
    folder.mkdir(parents=True)
    config = {
        "base_model_name_or_path": "tiny-lab/tiny",
        "lora_alpha": 4,
        "peft_type": "LORA",
        "r": 2,
        "target_modules": ["q_proj"],
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").write_bytes(_weights(seed))
    (folder / "README.md").write_text(f"# {name}\n")
    (folder / "lorahub.json").write_bytes(
        codec.encode(_manifest(folder, name, version, summary, task, base))
    )
    if key is not None:
        sign_folder(folder, key)
    return open_package(folder)


def sign_folder(folder: Path, key=KEY) -> None:
    """Write `model.sig` over the files that are there."""
    digests = {
        path.name: digest.of_bytes(path.read_bytes())
        for path in folder.iterdir()
        if path.name != "model.sig"
    }
    (folder / "model.sig").write_bytes(sign(digests, subject=folder.name, key=key))


def _weights(seed: int) -> bytes:
    prefix = f"base_model.model.{TARGET}"
    header = {
        f"{prefix}.lora_A.weight": {
            "dtype": "F32",
            "shape": [2, 4],
            "data_offsets": [0, 32],
        },
        f"{prefix}.lora_B.weight": {
            "dtype": "F32",
            "shape": [4, 2],
            "data_offsets": [32, 64],
        },
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = struct.pack("<16f", *(seed + number / 16 for number in range(16)))
    return struct.pack("<Q", len(text)) + text + data


def _manifest(
    folder: Path, name: str, version: str, summary: str, task: str, base: str
) -> Manifest:
    modules = derived.modules_of(open_adapter(folder))
    files = []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        found, size_bytes = digest.of_bytes(data), len(data)
        role = layout.role_of(path.name)
        files.append(File(path=path.name, role=role, size=size_bytes, sha256=found))
    return Manifest(
        manifest_version="1.0",
        name=name,
        version=version,
        kind=derived.kind_of(modules),
        summary=summary,
        created=CREATED,
        license="Apache-2.0",
        base=Base(
            root=digest.of_bytes(base.encode()),
            struct=digest.of_bytes(b"struct"),
            targets=(
                BaseTarget(
                    module=TARGET, shape=(4, 4), dtype="F32", sha256=digest.of_bytes(b"w")
                ),
            ),
            config=BaseConfig(model_type="llama"),
        ),
        adapter=AdapterInfo(
            format="peft-safetensors", modules=modules, summary=derived.summary_of(modules)
        ),
        task=Task(id=task),
        files=tuple(files),
    )
