"""From one dialect of adapter files to another, exactly or not at all. No torch."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lora_hub import atomic, refs
from lora_hub.errors import InputError
from lora_hub.formats.detect import DIALECTS, detect_and_read, open_adapter
from lora_hub.formats.dialect import ReadOptions, ScaleFrom, Written
from lora_hub.formats.engines import fit
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
        engine: for which serving engine, if for one.
        error: the largest relative error of a number of `scaling * b`; 0.0 where nothing
            was rounded, which is always so without an engine.
    """

    dialect: str
    evidence: tuple[str, ...]
    to: str
    out: str
    targets: int
    files: Mapping[str, int]
    notes: tuple[str, ...]
    engine: str | None = None
    error: float = 0.0


def convert(
    src: PathLike,
    to: str,
    out: PathLike,
    *,
    for_: str | None = None,
    dialect: str | None = None,
    base: PathLike | None = None,
    scale_from: ScaleFrom | None = None,
    alpha: float | None = None,
    enable_lora: Sequence[bool] | None = None,
    initial: PathLike | None = None,
    registry: PathLike | None = None,
) -> Converted:
    """Write an adapter to the folder `out` in another dialect; numbers are only moved.

    For an engine that reads only some of what a dialect can say, the adapter is said so
    that the engine computes the same: with one scaling and, where it needs that, one
    rank. Then `b` may be rounded, once; `error` says by how much.

    Args:
        src: an adapter's folder, a file of weights in it, a package or a reference.
        to: a name of `formats/detect.py`: peft, mlx, kohya, diffusers, loralib, gguf.
        out: a folder that does not exist yet.
        for_: a serving engine, a name of `formats/engines/table.py`: vllm, sglang,
            llama.cpp, lorax.
        dialect: what `src` is, where two dialects could be meant.
        base: folder of the base, for kohya and gguf, and for engines that need modules
            the adapter leaves alone.
        scale_from: "alpha" or "scale", where an MLX config holds both.
        alpha: `lora_alpha` of a loralib file.
        enable_lora: loralib's, which parts of a merged layer (q, k and v) are adapted.
        initial: folder of the factors before training (PiSSA, OLoRA, CorDA).
        registry: where references are looked up.

    Raises:
        FormatError: the source is ambiguous, or of a kind that is not read yet.
        LossyConversion: the dialect cannot say the adapter, or the engine would compute
            something else; its `losses` say what.
        StoreError: `out` is taken or cannot be written.
    """
    for name in filter(None, (to, dialect)):
        if name not in DIALECTS:
            raise InputError(
                f"{name!r} is no dialect", hint=f"dialects: {', '.join(DIALECTS)}"
            )
    engine = fit.engine_of(for_) if for_ else None
    if engine and to not in engine.writes:
        raise InputError(
            f"{engine.title} is given {' or '.join(engine.writes)}, not {to}",
            hint=f"say --to {engine.writes[0]}",
        )
    folder = None if base is None else Path(base)
    options = ReadOptions(
        base=folder,
        scale_from=scale_from,
        alpha=alpha,
        enable_lora=None if enable_lora is None else tuple(enable_lora),
        initial=None if initial is None else Path(initial),
    )
    found, evidence, notes, source = _read(src, dialect, options, registry)
    fitted = fit.fit(source, engine, folder) if engine else None
    written = _write(to, fitted.source if fitted else source, folder, engine is not None)
    with atomic.new_folder(Path(out)) as temporary:
        for name, chunks in written.files.items():
            atomic.replace(temporary / name, chunks)
        if fitted and to == "peft":
            fit.check(source, open_adapter(temporary, dialect=to), fitted.error)
    return Converted(
        dialect=found,
        evidence=evidence,
        to=to,
        out=os.fspath(out),
        targets=len((fitted.source if fitted else source).updates),
        files={name: sum(map(len, chunks)) for name, chunks in written.files.items()},
        notes=notes + (fitted.notes if fitted else ()) + written.notes,
        engine=for_,
        error=fitted.error if fitted else 0.0,
    )


def _write(
    to: str, source: AdapterSource, base: Path | None, is_for_engine: bool
) -> Written:
    written = DIALECTS[to].write(source, base)
    if not is_for_engine or to != "peft":
        return written
    return replace(written, files=fit.with_last_parts(written.files, source))


def _read(
    src: PathLike, dialect: str | None, options: ReadOptions, registry: PathLike | None
) -> tuple[str, tuple[str, ...], tuple[str, ...], AdapterSource]:
    """Return what the source is, the evidence, notes on the way, and the adapter."""
    text = os.fspath(src)
    path = Path(text).expanduser()
    is_path = not isinstance(src, str) or refs.is_path(text) or os.path.isfile(path)
    if is_path and not os.path.exists(path / MANIFEST_NAME):
        detected, source = detect_and_read(path, options, dialect=dialect)
        return detected.dialect.name, detected.evidence, (), source
    package = find(src, registry)
    evidence = f"it is the package {package.name} {package.version}"
    return "peft", (evidence,), package.notes, package.source
