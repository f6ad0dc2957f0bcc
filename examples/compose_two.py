"""Compose two adapters into one that PEFT, or anything that reads PEFT, can load.

Usage: python examples/compose_two.py [OUT]          (default: build/example/both)
"""

import sys

import lora_hub
from lora_hub.public.models import save

out = sys.argv[1] if len(sys.argv) > 1 else "build/example/both"

both = lora_hub.compose(
    {"style/shakespeare": 0.6, "style/milton": 0.4}, registry="registry"
)
save(both, out)
print(f"{len(both.updates)} targets in {out}")
