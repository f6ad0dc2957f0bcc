"""Where things are: folders, registries, switches, from the environment and one file.

    LORAHUB_HOME       keys, pins and config.toml   (default: the platform's folder)
    LORAHUB_CACHE      pulled packages              (default: the platform's folder)
    LORAHUB_REGISTRY   the registry used when none is named
    LORAHUB_TRUST      strict: refuse keys that are not pinned yet

`config.toml` names registries:

    default = "team"
    [registries]
    team = "/srv/adapters"

A folder there that is relative is relative to the file.
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
    """Return whether a key must be pinned before it is met for the first time.

    Raises:
        InputError: LORAHUB_TRUST says neither yes nor nothing.
    """
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
    location = config.registries.get(given, given)
    return str(expanded(location)) if location.startswith("~") else location


def registry_names() -> tuple[str, ...]:
    """Return the names that config.toml gives to registries, sorted."""
    return tuple(sorted(_read_config().registries))


def expanded(text: str) -> Path:
    """Return the path, `~` and `~user` replaced.

    Raises:
        InputError: there is no such user.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise InputError("no such user has a home folder here", where=text) from error


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
    except OSError as error:
        raise InputError(
            f"cannot be read: {error.strerror or error}", where=str(path)
        ) from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"cannot be read: {error}", where=str(path)) from error
    default, registries = value.get("default"), value.get("registries", {})
    if unknown := set(value) - {"default", "registries"}:
        raise InputError(f"unknown keys: {', '.join(sorted(unknown))}", where=str(path))
    if not isinstance(registries, dict) or not all(
        isinstance(item, str)
        for item in (*registries.values(), "" if default is None else default)
    ):
        raise InputError("default and registries hold strings alone", where=str(path))
    return _Config(default, {name: _beside(path, at) for name, at in registries.items()})


def _beside(config: Path, location: str) -> str:
    """Return the location; a relative folder is one beside config.toml, from anywhere."""
    return location if "://" in location else str(config.parent / expanded(location))


def _folder(variable: str, kind: str) -> Path:
    given = os.environ.get(variable)
    if given:
        return expanded(given)
    import platformdirs

    find = (
        platformdirs.user_config_path if kind == "config" else platformdirs.user_cache_path
    )
    return find("lorahub", appauthor=False)
