"""Which dialect an adapter's files speak, on what evidence, and the adapter in them.

`DIALECTS` is the table of what is read and written; `_FOREIGN` and `_HOME_MADE` name what
looks alike and is not read. A config that says whose it is decides; without one the names
in the header do, every one of them. Two readings are never chosen between: the caller is
asked. A pickle that lies beside is never opened.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_hub.errors import FormatError
from lora_hub.formats import diffusers, gguf, kohya, loralib, mlx, peft_config, peft_files
from lora_hub.formats.dialect import Dialect, Given, Glance, ReadOptions
from lora_hub.formats.files import CONFIG_NAME, WEIGHTS, Files, open_files
from lora_hub.formats.source import AdapterSource

# Unpickling runs code of the file's author.
PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")

# name → dialect
DIALECTS: Mapping[str, Dialect] = {
    dialect.name: dialect
    for dialect in (
        Dialect(
            name="peft",
            title="PEFT",
            weights_name=peft_files.WEIGHTS_NAME,
            says=peft_files.SAYS,
            read=peft_files.read,
            write=peft_files.write,
            claim_config=peft_files.claim_config,
            check_config=peft_config.check_config,
        ),
        Dialect(
            name="mlx",
            title="MLX-LM",
            weights_name=mlx.WEIGHTS_NAME,
            says=mlx.SAYS,
            read=mlx.read,
            write=mlx.write,
            claim_config=mlx.claim_config,
            claim_weights=mlx.claim_weights,
            check_config=mlx.check_config,
        ),
        Dialect(
            name="kohya",
            title="kohya's sd-scripts",
            weights_name=kohya.WEIGHTS_NAME,
            says=kohya.SAYS,
            read=kohya.read,
            write=kohya.write,
            claim_weights=kohya.claim_weights,
        ),
        Dialect(
            name="diffusers",
            title="diffusers",
            weights_name=diffusers.WEIGHTS_NAME,
            says=diffusers.SAYS,
            read=diffusers.read,
            write=diffusers.write,
            claim_weights=diffusers.claim_weights,
        ),
        Dialect(
            name="loralib",
            title="loralib",
            weights_name=loralib.WEIGHTS_NAME,
            says=loralib.SAYS,
            read=loralib.read,
            write=loralib.write,
            claim_weights=loralib.claim_weights,
        ),
        Dialect(
            name="gguf",
            title="llama.cpp",
            weights_name=gguf.WEIGHTS_NAME,
            says=gguf.SAYS,
            read=gguf.read,
            write=gguf.write,
            claim_weights=gguf.claim_weights,
        ),
    )
}

_HINT = "give a folder saved by PEFT: adapter_config.json, adapter_model.safetensors"

# Keys found together in an adapter_config.json → whose it is.
_FOREIGN = (
    ({"model_class", "model_type"}, "AdapterHub's"),
    ({"config", "hidden_size"}, "AdapterHub's"),
)

# What the names in a header look like → whose they are, where no dialect knows them.
_NAMES = (
    (
        re.compile(r"base_model\.model\..+"),
        f"PEFT's, and no {CONFIG_NAME} is there: without it nobody knows the scaling",
    ),
    (
        re.compile(r"(diffusion_model|double_blocks|single_blocks|lora_transformer)[._].+"),
        "FLUX's in the layout of BFL or ComfyUI, with q, k and v in one: not read yet",
    ),
    (re.compile(r".+\.loras\..+"), "AdapterHub's, which is not read yet"),
    (
        re.compile(r"[^.]+"),
        "home-made, without paths of modules: only their author knows what each changes",
    ),
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
    files = Files(where, frozenset(names), read, lambda name: Glance(name, b"", None))
    config = files.config()
    detected = _detect(files, config, "peft")
    weights = read(detected.weights_name)
    given = Given(where, detected.weights_name, weights, config or {})
    return detected.dialect.read(given, ReadOptions())


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
        raise _ambiguous(claims, f"{files.where}/{CONFIG_NAME}")
    if claims:
        ((dialect, evidence),) = claims
        return _with_weights(dialect, evidence, config or {}, files)
    is_asked = any(dialect.claim_config for dialect in known)
    if config is not None and is_asked and not files.chosen:
        raise FormatError(
            f"the config is {_owner(config)}",
            where=f"{files.where}/{CONFIG_NAME}",
            hint=_HINT,
        )
    return _by_weights(files, known)


def _with_weights(
    dialect: Dialect, evidence: str, config: Mapping[str, Any], files: Files
) -> Detected:
    # Before the weights: what the config says tells more than a file that is missing.
    if dialect.check_config:
        dialect.check_config(config, f"{files.where}/{CONFIG_NAME}")
    name = files.chosen or dialect.weights_name
    if name not in files.names:
        raise _without_weights(dialect, files.names, files.where)
    return Detected(dialect, name, (evidence,))


def _by_weights(files: Files, known: list[Dialect]) -> Detected:
    """Return what the names in the files' own headers say."""
    names = [files.chosen] if files.chosen else _having(files.names, *WEIGHTS)
    readable = [dialect for dialect in known if dialect.claim_weights]
    if not names or not readable:
        raise FormatError(_without_config(files.names), where=files.where, hint=_HINT)
    glances = [files.glance(name) for name in names]
    claims = [
        Detected(dialect, glance.name, (evidence,))
        for glance in glances
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
        raise _ambiguous(pairs, f"{files.where}/{claims[0].weights_name}")
    if claims:
        return claims[0]
    if len(known) == 1:
        raise FormatError(f"nothing here is of {known[0].title}", where=files.where)
    raise _unclaimed(glances, files)


def _ambiguous(claims: list[tuple[Dialect, str]], where: str) -> FormatError:
    readings = "; or as ".join(f"{dialect.title}'s: {said}" for dialect, said in claims)
    names = " or ".join(dialect.name for dialect, _ in claims)
    return FormatError(
        f"can be read as {readings}",
        where=where,
        hint=f"say which with `lorahub convert … --from`: {names}",
    )


def _unclaimed(glances: list[Glance], files: Files) -> FormatError:
    if len(glances) > 1:
        return FormatError(_without_config(files.names), where=files.where, hint=_HINT)
    (glance,) = glances
    where = f"{files.where}/{glance.name}"
    names = list(glance.header.tensors) if glance.header else []
    if not names:
        return FormatError("holds no tensors", where=where)
    for pattern, whose in _NAMES:
        if all(pattern.fullmatch(name) for name in names):
            return FormatError(f"the names ({names[0]!r}, …) are {whose}", where=where)
    return FormatError(
        f"the names ({names[0]!r}, …) are of no dialect that is read, and there is no "
        f"{CONFIG_NAME}: nobody knows the scaling of the factors",
        where=where,
        hint=f"dialects: {', '.join(DIALECTS)}",
    )


def _without_config(names: Collection[str]) -> str:
    weights = _having(names, *WEIGHTS)
    if weights:
        return (
            f"there is no {CONFIG_NAME} beside {weights[0]!r}: without it nobody knows the "
            "scaling of the factors"
        )
    pickles = _having(names, *PICKLES)
    if pickles:
        return (
            f"there is no {CONFIG_NAME}, and {pickles[0]!r} is a pickle, which is never "
            "read"
        )
    return f"there is no {CONFIG_NAME}: no adapter is here"


def _without_weights(dialect: Dialect, names: Collection[str], where: str) -> FormatError:
    weights = _having(names, ".safetensors")
    pickles = _having(names, *PICKLES)
    if weights:
        return FormatError(
            f"there is no {dialect.weights_name}; found {', '.join(map(repr, weights))}",
            where=where,
            hint=f"if that is the adapter's file, rename it to {dialect.weights_name}, or "
            "give `lorahub convert` the file itself",
        )
    if pickles:
        return FormatError(
            f"{pickles[0]!r} is a pickle, which can run code and is never read",
            where=where,
            hint="load it where you trust it and save it again with PEFT 0.18 or later",
        )
    return FormatError(f"there is no {dialect.weights_name}", where=where)


def _owner(config: Mapping[str, Any]) -> str:
    for keys, owner in _FOREIGN:
        if keys <= config.keys():
            return f"{owner}, which is not read yet"
    return "none that is known: it names no peft_type"


def _having(names: Collection[str], *suffixes: str) -> list[str]:
    return sorted(name for name in names if name.lower().endswith(suffixes))
