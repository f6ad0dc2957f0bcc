"""Digests of tensors kept between runs, by the identity of the file that holds them.

One small JSON file for each checkpoint file, named by its device, inode, size and time of
change. It only saves time: a cache file that is missing, broken or of another form is the
same as none and is written anew.
"""

import json
from pathlib import Path

from lora_hub import atomic, strict_json
from lora_hub.digest import is_digest
from lora_hub.errors import DocumentError, StoreError
from lora_hub.tensors.file import Identity

SCHEMA = "lorahub.base-digests/1"
MAX_BYTES = 256 << 20

# dtype in which the bytes were hashed → tensor name → digest
Known = dict[str, dict[str, str]]


def load(folder: Path, identity: Identity) -> Known:
    """Return what is known of a file, {} where nothing is."""
    try:
        document = strict_json.read_object(folder / _name(identity), max_bytes=MAX_BYTES)
    except DocumentError:
        return {}
    known = document.get("digests")
    whole = (
        document.get("schema") == SCHEMA
        and isinstance(known, dict)
        and all(isinstance(names, dict) for names in known.values())
        and all(
            isinstance(digest, str) and is_digest(digest)
            for names in known.values()
            for digest in names.values()
        )
    )
    return known if whole and known else {}


def save(folder: Path, identity: Identity, known: Known) -> None:
    """Keep what is known of a file; a folder that cannot be written is no error."""
    text = json.dumps({"schema": SCHEMA, "digests": known}, indent=1, sort_keys=True)
    try:
        atomic.replace(folder / _name(identity), [text.encode()])
    except StoreError:
        # The cache only saves time; the disk being full is for others to report.
        return


def _name(identity: Identity) -> str:
    return "-".join(str(number) for number in identity) + ".json"
