"""Findings about a manifest's bytes, all of them at once."""

import itertools
from typing import TYPE_CHECKING, Any

from lora_hub.errors import DocumentError, InputError
from lora_hub.manifest import codec
from lora_hub.manifest.document import Manifest
from lora_hub.manifest.schema import manifest_schema
from lora_hub.manifest.tasks import TASKS
from lora_hub.package import spdx
from lora_hub.package.package import check_manifest
from lora_hub.validation.findings import MOST, Finding, finding, from_error
from lora_hub.validation.texts import check_document

if TYPE_CHECKING:
    from jsonschema.exceptions import ValidationError

# Messages of the schema quote the value they are about, which may be the whole document.
_MAX_CHARACTERS = 200


def check_bytes(data: bytes, where: str) -> tuple[Manifest | None, list[Finding]]:
    """Return the manifest, None where it cannot be used, and the findings."""
    try:
        parsed = codec.parse(data, where=where)
    except DocumentError as error:
        return None, [from_error("LH001", error, where)]
    value = parsed.value
    found = []
    if not parsed.is_canonical:
        found.append(finding("LH003", where, "the document is not in canonical form"))
    try:
        manifest = codec.manifest_of(parsed, where=where)
    except DocumentError as error:
        # The types name the first breach, the schema all of them, and takes its time.
        return None, [
            *(_check_schema(value, where) or [from_error("LH002", error, where)]),
            *found,
        ]
    if found:
        return None, found
    found += _check_terms(manifest, where) + check_document(data, value, where)
    # A newer program may know them.
    if not codec.is_newer(manifest):
        found += [
            finding("LH004", f"{where}#{pointer}", "the field is not known")
            for pointer in codec.unknown_fields(parsed.rest)
        ]
    try:
        check_manifest(manifest, where=where)
    except DocumentError as error:
        return None, [*found, from_error("LH005", error, where)]
    return manifest, found


def _check_schema(value: dict[str, Any], where: str) -> list[Finding]:
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import best_match

    errors = Draft202012Validator(manifest_schema()).iter_errors(value)
    # Of the alternatives of a field, the one that the author most likely meant.
    # Each error holds what it is about; of a flood enough are kept to say that it is one.
    likely = [best_match([error]) or error for error in itertools.islice(errors, 2 * MOST)]
    return [
        finding("LH002", f"{where}{_pointer(error)}", _message(error))
        for error in sorted(likely, key=lambda error: [str(p) for p in error.absolute_path])
    ]


def _pointer(error: "ValidationError") -> str:
    parts = [
        str(part).replace("~", "~0").replace("/", "~1") for part in error.absolute_path
    ]
    return f"#/{'/'.join(parts)}" if parts else ""


def _message(error: "ValidationError") -> str:
    text = error.message
    return text if len(text) <= _MAX_CHARACTERS else f"{text[:_MAX_CHARACTERS]}…"


def _check_terms(manifest: Manifest, where: str) -> list[Finding]:
    found = []
    licenses = {"license": manifest.license, "base/license": manifest.base.license}
    for field, expression in licenses.items():
        try:
            if expression is not None:
                spdx.check_license(expression)
                found += [
                    finding("LH008", f"{where}#/{field}", f"{name!r} is not on SPDX's list")
                    for name in spdx.unlisted(expression)
                ]
        except InputError as error:
            found.append(finding("LH006", f"{where}#/{field}", error.problem, error.hint))
    first = manifest.task.id.partition("/")[0]
    if first not in TASKS:
        found.append(finding("LH007", f"{where}#/task/id", f"{first!r} is no task"))
    return found
