"""Which dialect an adapter's files speak, on what evidence, and the adapter in them.

`DIALECTS` is the table of what is read and written; what looks alike and is not read,
`not_read.py` names. A config that says whose it is decides; without one the names
in the header do, every one of them. Two readings are never chosen between: the caller is
asked. A pickle that lies beside is never opened.
"""

import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_hub.errors import FormatError
from lora_hub.formats import not_read
from lora_hub.formats.dialect import Dialect, Given, Glance, ReadOptions
from lora_hub.formats.files import (
    CONFIG_NAME,
    MAX_HEADERS_BYTES,
    WEIGHTS,
    Files,
    open_files,
)
from lora_hub.formats.source import AdapterSource
from lora_hub.recent import MAX_KEY_BYTES, Recent


def _peft() -> Dialect:
    from lora_hub.formats import peft_config, peft_files

    return Dialect(
        name="peft",
        title="PEFT",
        weights_name=peft_files.WEIGHTS_NAME,
        says=peft_files.SAYS,
        read=peft_files.read,
        write=peft_files.write,
        claim_config=peft_files.claim_config,
        check_config=peft_config.check_config,
    )


def _mlx() -> Dialect:
    from lora_hub.formats import mlx, mlx_config

    return Dialect(
        name="mlx",
        title="MLX-LM",
        weights_name=mlx.WEIGHTS_NAME,
        says=mlx.SAYS,
        read=mlx.read,
        write=mlx.write,
        claim_config=mlx.claim_config,
        claim_weights=mlx.claim_weights,
        check_config=mlx_config.check_config,
    )


def _kohya() -> Dialect:
    from lora_hub.formats import kohya

    return Dialect(
        name="kohya",
        title="kohya's sd-scripts",
        weights_name=kohya.WEIGHTS_NAME,
        says=kohya.SAYS,
        read=kohya.read,
        write=kohya.write,
        claim_weights=kohya.claim_weights,
    )


def _diffusers() -> Dialect:
    from lora_hub.formats import diffusers

    return Dialect(
        name="diffusers",
        title="diffusers",
        weights_name=diffusers.WEIGHTS_NAME,
        says=diffusers.SAYS,
        read=diffusers.read,
        write=diffusers.write,
        claim_weights=diffusers.claim_weights,
    )


def _loralib() -> Dialect:
    from lora_hub.formats import loralib

    return Dialect(
        name="loralib",
        title="loralib",
        weights_name=loralib.WEIGHTS_NAME,
        says=loralib.SAYS,
        read=loralib.read,
        write=loralib.write,
        claim_weights=loralib.claim_weights,
    )


def _gguf() -> Dialect:
    from lora_hub.formats import gguf

    return Dialect(
        name="gguf",
        title="llama.cpp",
        weights_name=gguf.WEIGHTS_NAME,
        says=gguf.SAYS,
        read=gguf.read,
        write=gguf.write,
        claim_weights=gguf.claim_weights,
    )


class _Table(Mapping[str, Dialect]):
    """Name → dialect. A row is made when it is asked for: most readers of packages need
    one, and the others' files take a tenth of the start-up.
    """

    def __init__(self, rows: Mapping[str, Callable[[], Dialect]]) -> None:
        self._rows = {name: functools.cache(row) for name, row in rows.items()}

    def __getitem__(self, name: str) -> Dialect:
        return self._rows[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


# name → dialect
DIALECTS: Mapping[str, Dialect] = _Table(
    {
        "peft": _peft,
        "mlx": _mlx,
        "kohya": _kohya,
        "diffusers": _diffusers,
        "loralib": _loralib,
        "gguf": _gguf,
    }
)


@dataclass(frozen=True, slots=True)
class Detected:
    """What an adapter's files turned out to be.

    Attributes:
        weights_name: the file that holds the factors.
        evidence: why, a sentence each.
    """

    dialect: Dialect
    weights_name: str
    evidence: tuple[str, ...]


def open_adapter(
    path: Path, options: ReadOptions | None = None, *, dialect: str | None = None
) -> AdapterSource:
    """Return the adapter in a folder or a file, in any dialect of the table.

    Symbolic links are followed: the folder is the caller's own, often a download cache.

    Args:
        path: a folder, or one file of weights in it.
        options: what no file says.
        dialect: its name, where two dialects could be meant.

    Raises:
        InputError: the folder or a file in it cannot be read; `FormatError`,
            `DocumentError` and `TensorFileError` say what is wrong with the content.
    """
    return detect_and_read(path, options, dialect=dialect)[1]


def detect_and_read(
    path: Path, options: ReadOptions | None = None, *, dialect: str | None = None
) -> tuple[Detected, AdapterSource]:
    """Return what the files are, and the adapter in them; as `open_adapter`."""
    files = open_files(path)
    config = files.config()
    detected = _detect(files, config, dialect)
    given = Given(
        where=files.where,
        weights_name=detected.weights_name,
        weights=files.read(detected.weights_name),
        config=config or {} if detected.dialect.claim_config else {},
    )
    return detected, detected.dialect.read(given, options or ReadOptions())


def detect(path: Path, *, dialect: str | None = None) -> Detected:
    """Return what the files in a folder, or a file, are, and how we know.

    Raises:
        FormatError: nothing that is read is there, or two dialects could be meant.
    """
    files = open_files(path)
    return _detect(files, files.config(), dialect)


def source_from_files(
    read: Callable[[str], bytes], names: Collection[str], *, where: str
) -> AdapterSource:
    """Return the adapter in the files of a package, which is a directory of PEFT's.

    Args:
        read: file name → its bytes.
        names: of all files there are; only those of the dialect are read.
        where: what to call the place in messages.

    Raises:
        FormatError: there is no adapter, or something in it cannot be applied exactly.
            DocumentError, TensorFileError: a file is broken.
    """
    dialect = DIALECTS["peft"]
    data = read(CONFIG_NAME) if CONFIG_NAME in names else b""
    config = _RECENT.get(data) if dialect.weights_name in names else None
    if config is not None:
        weights_name = dialect.weights_name
    else:
        files = Files(
            where,
            frozenset(names),
            lambda name: data if name == CONFIG_NAME else read(name),  # read once
            lambda name: Glance(name, b"", None),
        )
        config = files.config()
        weights_name = _detect(files, config, dialect.name).weights_name
        if config is not None and len(data) <= MAX_KEY_BYTES:
            _RECENT.keep(data, config)
    given = Given(where, weights_name, read(weights_name), config or {})
    return dialect.read(given, ReadOptions())


# The bytes of a config of PEFT's → the object in it, in which nothing was refused.
_RECENT: Recent[dict[str, Any]] = Recent()


# ── what it is ───────────────────────────────────────────────────────────────────────


def _detect(files: Files, config: dict[str, Any] | None, said: str | None) -> Detected:
    known = [DIALECTS[said]] if said else list(DIALECTS.values())
    claims = []
    if config is not None:
        claims = [
            (dialect, evidence)
            for dialect in known
            if dialect.claim_config and (evidence := dialect.claim_config(config))
        ]
    if len(claims) > 1:
        raise not_read.ambiguous(claims, f"{files.where}/{CONFIG_NAME}")
    if claims:
        ((dialect, evidence),) = claims
        return _with_weights(dialect, evidence, config or {}, files)
    is_asked = any(dialect.claim_config for dialect in known)
    if config is not None and is_asked and not files.chosen:
        raise not_read.foreign_config(config, f"{files.where}/{CONFIG_NAME}")
    return _by_weights(files, known)


def _with_weights(
    dialect: Dialect, evidence: str, config: Mapping[str, Any], files: Files
) -> Detected:
    # Before the weights: what the config says tells more than a file that is missing.
    if dialect.check_config:
        dialect.check_config(config, f"{files.where}/{CONFIG_NAME}")
    name = files.chosen or dialect.weights_name
    if name in files.names:
        return Detected(dialect, name, (evidence,))
    # A copy of a download, or a checkpoint of training: there is nothing else to mean.
    other = not_read.only_weights(files)
    if files.chosen or other is None:
        raise not_read.without_weights(dialect, files)
    said = f"{other!r} is the only file of weights beside it"
    return Detected(dialect, other, (evidence, said))


def _by_weights(files: Files, known: list[Dialect]) -> Detected:
    """Return what the names in the files' own headers say."""
    names = [files.chosen] if files.chosen else not_read.having(files.names, *WEIGHTS)
    readable = [dialect for dialect in known if dialect.claim_weights]
    if not names or not readable:
        raise not_read.without_config(files)
    glances, claims, left = [], [], MAX_HEADERS_BYTES
    for name in names:
        if left < 0:
            raise FormatError(
                f"{len(names)} files of weights lie here, and not all are looked at: their "
                "headers have more than 8 MiB",
                where=files.where,
                hint="give the file that is meant instead of the folder",
            )
        glance = files.glance(name)
        left -= glance.header.data_start if glance.header else 0
        glances.append(glance)
        claims += [
            Detected(dialect, name, (evidence,))
            for dialect in readable
            if dialect.claim_weights and (evidence := dialect.claim_weights(glance))
        ]
    if len({found.weights_name for found in claims}) > 1:
        found_names = ", ".join(f"{c.weights_name!r} ({c.dialect.title})" for c in claims)
        raise FormatError(
            f"there are several adapters: {found_names}",
            where=files.where,
            hint="give the file that is meant instead of the folder",
        )
    if len(claims) > 1:
        pairs = [(found.dialect, found.evidence[0]) for found in claims]
        raise not_read.ambiguous(pairs, f"{files.where}/{claims[0].weights_name}")
    if claims:
        return claims[0]
    if len(known) == 1:
        raise FormatError(f"nothing here is of {known[0].title}", where=files.where)
    raise not_read.unclaimed(glances, files, DIALECTS)
