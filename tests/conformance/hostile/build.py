"""The hostile set: all cases, and their files on the disk.

`python -m tests.conformance.hostile.build FOLDER` writes them for others to try their
readers on: one folder a case, and `cases.json` that says what each is.
"""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.conformance.hostile import (
    configs,
    folders,
    headers,
    manifests,
    registries,
    signatures,
)
from tests.conformance.hostile.case import FILL, Case

CASES: Mapping[str, Case] = {
    case.slug: case
    for part in (headers, configs, folders, manifests, signatures, registries)
    for case in part.CASES
}


def build(case: Case, folder: Path) -> Path:
    """Make the case's files below the folder; return it."""
    folder.mkdir(parents=True)
    FILL[case.kind](folder)
    case.build(folder)
    return folder


def build_all(root: Path) -> Path:
    """Make all cases, each in the folder of its slug."""
    # What is published carries a time.
    os.environ["SOURCE_DATE_EPOCH"] = "1795392000"
    for slug, case in CASES.items():
        build(case, root / slug)
    told = {
        slug: {
            "name": case.name,
            "threat": case.threat,
            "kind": case.kind,
            "command": case.command,
            "refusal": case.refusal,
            "says": case.says,
        }
        for slug, case in CASES.items()
    }
    (root / "cases.json").write_text(json.dumps(told, indent=1) + "\n")
    return root


if __name__ == "__main__":
    build_all(Path(sys.argv[1]))
