"""Findings about the free text that other tools leave in a safetensors header.

Nothing is computed from it here, but others believe it: which base a file is for, the
digest of its contents. What can be compared with the tensors is compared.
"""

import hashlib
import re

from lora_hub.tensors.file import TensorFile
from lora_hub.validation.findings import Finding, finding
from lora_hub.validation.texts import check_text

_OF_NOTHING = hashlib.sha256(b"").hexdigest()
_PATH = re.compile(r"(?:^|[\s\"'=])(/(?:home|Users|root|mnt|workspace)/|[A-Za-z]:\\)")

# What kohya's and the model specification's keys say of the base, as they spell it →
# which of the three families of image models that is.
_SAID = (
    (re.compile(r"sdxl|stable-diffusion-xl", re.IGNORECASE), "SDXL"),
    (re.compile(r"flux", re.IGNORECASE), "FLUX"),
    (
        re.compile(r"sd[_-]?v?[12]\b|sd_v[12]|stable-diffusion-v[12]", re.IGNORECASE),
        "SD 1 or 2",
    ),
)
_SAYING = ("modelspec.architecture", "ss_base_model_version")

# Names of tensors that only one family has.
_HELD = (
    (re.compile(r"double_blocks|single_blocks|single_transformer_blocks"), "FLUX"),
    (re.compile(r"lora_te2_|text_encoder_2"), "SDXL"),
)


def check_header(tensors: TensorFile) -> list[Finding]:
    """Return the findings about the metadata and the names in the header of a file."""
    where = tensors.where
    found = []
    for key, value in tensors.header.metadata.items():
        at = f"{where}: __metadata__.{key.encode('ascii', 'backslashreplace').decode()}"
        found += check_text(key + value, at)
        if "hash" in key and len(value) >= 8 and _OF_NOTHING.startswith(value.lower()):
            found.append(
                finding("LH028", at, "the recorded hash is the SHA-256 of nothing")
            )
        if _PATH.search(value):
            found.append(
                finding("LH028", at, "the text holds a path of its author's machine")
            )
    found += check_text("".join(tensors.header.tensors), where)
    return found + _check_family(tensors)


def _check_family(tensors: TensorFile) -> list[Finding]:
    metadata = tensors.header.metadata
    if not any(key in metadata for key in _SAYING):
        return []
    held = next(
        (
            family
            for name in tensors.header.tensors
            for pattern, family in _HELD
            if pattern.search(name)
        ),
        None,
    )
    return [
        finding(
            "LH028",
            f"{tensors.where}: __metadata__.{key}",
            f"it says {metadata[key][:60]!r}, the tensors are those of {held}",
        )
        for key in _SAYING
        for said in [_family(metadata.get(key, ""))]
        if held and said and said != held
    ]


def _family(text: str) -> str | None:
    return next((family for pattern, family in _SAID if pattern.search(text)), None)
