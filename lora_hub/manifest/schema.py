"""The JSON Schema (2020-12) of the documents, made from their types.

`schemas/*.json` hold what this returns; a test keeps the two equal, and
`python -m lora_hub.manifest.schema` writes them anew.
"""

import json
from pathlib import Path
from typing import Any

import msgspec

from lora_hub.manifest.document import Manifest


def manifest_schema() -> dict[str, Any]:
    """Return the published schema of `lorahub.json`."""
    schema = msgspec.json.schema(Manifest)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "urn:lorahub:schema:manifest:1",
        "title": "lora_hub manifest, version 1",
        **schema,
    }


SCHEMAS = {"manifest-v1.json": manifest_schema}


def text(name: str) -> str:
    """Return the text of one schema file."""
    return json.dumps(SCHEMAS[name](), indent=2, sort_keys=True) + "\n"


if __name__ == "__main__":
    for file_name in SCHEMAS:
        Path("schemas", file_name).write_text(text(file_name))
