"""From one dialect of adapter files to another, exactly or not at all. No torch."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lora_hub import atomic, refs
from lora_hub.errors import InputError
from lora_hub.formats.detect import DIALECTS, detect_and_read
from lora_hub.formats.dialect import ReadOptions, ScaleFrom
from lora_hub.formats.source import AdapterSource
from lora_hub.manifest.document import MANIFEST_NAME
from lora_hub.public.find import find

PathLike = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class Converted:
    """What was read, and what was written.

    Attributes:
        dialect: what the source was, a name of `formats/detect.py`.
        evidence: how we know, a sentence each.
        to: the dialect written.
        files: name → size in bytes.
        notes: what a person should know, a sentence each.
    """

    dialect: str
    evidence: tuple[str, ...]
    to: str
    out: str
    targets: int
    files: Mapping[str, int]
    notes: tuple[str, ...]


def convert(
    src: PathLike,
    to: str,
    out: PathLike,
    *,
    dialect: str | None = None,
    base: PathLike | None = None,
    scale_from: ScaleFrom | None = None,
    alpha: float | None = None,
    registry: PathLike | None = None,
) -> Converted:
    """Write an adapter to the folder `out` in another dialect; numbers are only moved.

    Args:
        src: an adapter's folder, a file of weights in it, a package or a reference.
        to: a name of `formats/detect.py`: peft, mlx, kohya, diffusers, loralib, gguf.
        out: a folder that does not exist yet.
        dialect: what `src` is, where two dialects could be meant.
        base: folder of the base, for kohya and gguf.
        scale_from: "alpha" or "scale", where an MLX config holds both.
        alpha: `lora_alpha` of a loralib file.
        registry: where references are looked up.

    Raises:
        FormatError: the source is ambiguous, or of a kind that is not read yet.
        LossyConversion: the dialect cannot say the adapter; its `losses` say what.
        StoreError: `out` is taken or cannot be written.
    """
    for name in filter(None, (to, dialect)):
        if name not in DIALECTS:
            raise InputError(
                f"{name!r} is no dialect", hint=f"dialects: {', '.join(DIALECTS)}"
            )
    folder = None if base is None else Path(base)
    options = ReadOptions(base=folder, scale_from=scale_from, alpha=alpha)
    found, evidence, notes, source = _read(src, dialect, options, registry)
    written = DIALECTS[to].write(source, folder)
    with atomic.new_folder(Path(out)) as temporary:
        for name, chunks in written.files.items():
            atomic.replace(temporary / name, chunks)
    return Converted(
        dialect=found,
        evidence=evidence,
        to=to,
        out=os.fspath(out),
        targets=len(source.updates),
        files={name: sum(map(len, chunks)) for name, chunks in written.files.items()},
        notes=notes + written.notes,
    )


def _read(
    src: PathLike, dialect: str | None, options: ReadOptions, registry: PathLike | None
) -> tuple[str, tuple[str, ...], tuple[str, ...], AdapterSource]:
    """Return what the source is, the evidence, notes on the way, and the adapter."""
    text = os.fspath(src)
    path = Path(text).expanduser()
    is_path = not isinstance(src, str) or refs.is_path(text) or path.is_file()
    if is_path and not (path / MANIFEST_NAME).exists():
        detected, source = detect_and_read(path, options, dialect=dialect)
        return detected.dialect.name, detected.evidence, (), source
    package = find(src, registry)
    evidence = f"it is the package {package.name} {package.version}"
    return "peft", (evidence,), package.notes, package.source
