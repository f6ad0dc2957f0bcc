"""Pack your own adapter, sign it, and publish it in a registry of your own.

Usage: python examples/pack_and_sign.py [OUT]          (default: build/example)
"""

import sys
from pathlib import Path

import lora_hub
from lora_hub.public.keys import keygen
from lora_hub.public.publishing import init_registry

out = Path(sys.argv[1] if len(sys.argv) > 1 else "build/example")

# A key pair, once. The private half stays with you.
keys = keygen(out / "my.key")

# The folder PEFT saved, and the base it was trained on.
lora_hub.pack(
    "tests/assets/adapters/shakespeare",
    name="me/shakespeare",
    version="0.1.0",
    base="build/base",
    task="text-generation/verse",
    license="Apache-2.0",
    summary="Verse with stage voices.",
    out=out / "package",
)
lora_hub.sign(out / "package", keys.private)

# Anyone with the public half can check every byte, with this or with model_signing.
signed = lora_hub.verify(out / "package", keys.public)
print(f"{len(signed.files)} files signed with {signed.fingerprint}")

# A registry is a folder. The first push into a namespace claims it for the signer's key.
init_registry(out / "registry", name="mine")
result = lora_hub.push(out / "package", out / "registry", keys.public)
print(f"published {result.name} {result.version} as {result.package}")
