"""Merge an adapter into a checkpoint that needs neither lora_hub nor PEFT to run.

Usage: python examples/merge_checkpoint.py [OUT]          (default: build/example/merged)
"""

import sys

import lora_hub

out = sys.argv[1] if len(sys.argv) > 1 else "build/example/merged"

report = lora_hub.merge(
    base="build/base", adapters={"style/milton": 1.0}, out=out, registry="registry"
)
print(report)
