"""What validation can mend by itself: the config of a bare PEFT folder, and file names.

Keys at PEFT's own defaults go, and so does a base named by a local path: it says nothing to
others and tells where the adapter was trained. What differs from the defaults stays as it
is. Weights get the name that PEFT looks for where they are the only ones; their bytes are
never touched, and packages never: theirs are signed.

Source of the defaults: PEFT 0.21.2, `tuners/lora/config.py`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_hub import atomic, strict_json
from lora_hub.errors import DocumentError, LoraHubError
from lora_hub.formats.detect import detect_and_read
from lora_hub.formats.files import CONFIG_NAME
from lora_hub.formats.peft_tensors import WEIGHTS_NAME
from lora_hub.manifest.document import MANIFEST_NAME
from lora_hub.signing.statement import SIGNATURE_NAME
from lora_hub.validation.base_name import is_local

# Defaults that say something; those of all other keys are null, false or empty.
_DEFAULTS = {
    "bias": "none",
    "init_lora_weights": True,
    "lora_dropout": 0.0,
    "megatron_core": "megatron.core",
    "qalora_group_size": 16,
}
# Engines expect them, whatever their values.
_KEPT = frozenset({"lora_alpha", "peft_type", "r", "target_modules"})


def fix_folder(folder: Path) -> tuple[str, ...]:
    """Mend the config of an adapter's folder and its names; return the changes, in words.

    Nothing is changed where the folder is a package, or its config is no LoRA's or cannot
    be read: validation says why.

    Raises:
        StoreError: the file cannot be written; it is then as it was.
    """
    path = folder / CONFIG_NAME
    if any((folder / name).exists() for name in (MANIFEST_NAME, SIGNATURE_NAME)):
        return ()
    try:
        config = strict_json.read_object(path)
    except DocumentError:
        return ()
    mended, changes = mend_config(config)
    if changes:
        atomic.replace(path, [json.dumps(mended, indent=2).encode() + b"\n"])
    said = [f"{path}: {change}" for change in changes]
    if config.get("peft_type") == "LORA":
        said += _renamed(folder)
    return tuple(said)


def _renamed(folder: Path) -> list[str]:
    """Give the adapter's weights PEFT's name; return what was done, [] for nothing."""
    try:
        weights = folder / detect_and_read(folder)[0].weights_name
    except LoraHubError:
        return []  # it may be no adapter's file
    if weights.name == WEIGHTS_NAME or weights.is_symlink():
        return []
    atomic.rename(weights, folder / WEIGHTS_NAME)
    return [f"{weights}: renamed to {WEIGHTS_NAME}"]


def mend_config(config: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the config with what differs from PEFT's defaults, and what was left out."""
    if config.get("peft_type") != "LORA":
        return dict(config), ()
    changes = []
    mended = dict(config)
    base = config.get("base_model_name_or_path")
    if isinstance(base, str) and is_local(base):
        for key in ("base_model_name_or_path", "revision"):
            mended.pop(key, None)
        changes.append("removed the base's name, which is a local path")
    plain = [key for key, value in mended.items() if _is_default(key, value)]
    for key in plain:
        del mended[key]
    if plain:
        changes.append(f"removed keys at PEFT's defaults: {', '.join(plain)}")
    return mended, tuple(changes)


def _is_default(key: str, value: Any) -> bool:
    if key in _KEPT:
        return False
    if key in _DEFAULTS:
        return bool(value == _DEFAULTS[key])
    return value is None or value is False or value in ([], {})
