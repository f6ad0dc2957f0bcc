"""Where things are: folders, registries, switches, from the environment and one file.

    LORAHUB_HOME       keys, pins and config.toml   (default: the platform's folder)
    LORAHUB_CACHE      pulled packages              (default: the platform's folder)
    LORAHUB_REGISTRY   the registry used when none is named
    LORAHUB_TRUST      strict: refuse keys that are not pinned yet

`config.toml` names registries:

    default = "team"
    [registries]
    team = "/srv/adapters"
"""

import os
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_hub.errors import InputError


def home() -> Path:
    """Return the folder of keys, pins and configuration."""
    return _folder("LORAHUB_HOME", "config")


def cache_folder() -> Path:
    """Return the folder of pulled packages and digests of bases."""
    return _folder("LORAHUB_CACHE", "cache")


def default_key() -> Path:
    """Return where `keygen` writes and `sign` looks when no file is named."""
    return home() / "keys" / "default.key"


def is_strict() -> bool:
    """Return whether a key must be pinned before it is met for the first time."""
    value = os.environ.get("LORAHUB_TRUST", "")
    if value not in ("", "strict"):
        raise InputError(
            f"{value!r} is not known, expected 'strict' or nothing", where="LORAHUB_TRUST"
        )
    return value == "strict"


def registry_location(named: str | None) -> str:
    """Return the location that a registry's name, or no name at all, stands for.

    Raises:
        InputError: nothing was named and there is no default.
    """
    config = _read_config()
    given = named or os.environ.get("LORAHUB_REGISTRY") or config.default
    if given is None:
        raise InputError(
            "no registry was named",
            hint="give --registry FOLDER, or set LORAHUB_REGISTRY",
        )
    return config.registries.get(given, given)


@dataclass(frozen=True, slots=True)
class _Config:
    default: str | None
    registries: dict[str, str]


def _read_config() -> _Config:
    path = home() / "config.toml"
    try:
        value: dict[str, Any] = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return _Config(None, {})
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"cannot be read: {error}", where=str(path)) from error
    default, registries = value.get("default"), value.get("registries", {})
    if unknown := set(value) - {"default", "registries"}:
        raise InputError(f"unknown keys: {', '.join(sorted(unknown))}", where=str(path))
    if not isinstance(registries, dict) or not all(
        isinstance(item, str) for item in (*registries.values(), default or "")
    ):
        raise InputError("default and registries hold strings alone", where=str(path))
    return _Config(default, registries)


def _folder(variable: str, kind: str) -> Path:
    given = os.environ.get(variable)
    if given:
        return Path(given).expanduser()
    import platformdirs

    find = (
        platformdirs.user_config_path if kind == "config" else platformdirs.user_cache_path
    )
    return find("lorahub", appauthor=False)
