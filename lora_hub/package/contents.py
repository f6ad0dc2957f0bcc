"""The bytes of a package's files, from the author's folder and what was read there.

Tensors are copied byte for byte in the order of their names; the config is written anew
with what PEFT needs and nothing else; of the author's other files only those with a role
come along. The manifest over them is the matter of `pack.py`.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from lora_hub import canonical, links, strict_json
from lora_hub.base.folder import TOKENIZER_CONFIG_NAME
from lora_hub.errors import FormatError, InputError, LossyConversion
from lora_hub.formats import peft
from lora_hub.formats.files import CONFIG_NAME, WEIGHTS
from lora_hub.formats.peft_sayable import check_sayable
from lora_hub.formats.source import AdapterSource
from lora_hub.manifest.document import BaseHint
from lora_hub.package import layout
from lora_hub.package.layout import CARD_NAME
from lora_hub.tensors.foreign import PICKLE_SUFFIXES
from lora_hub.tensors.write import chunks_of

# A file's content in pieces.
Chunks = tuple[bytes | memoryview, ...]


def weights_and_config(
    source: AdapterSource, hints: Sequence[BaseHint], base_tensors: frozenset[str]
) -> dict[str, Chunks]:
    """Return the two files of PEFT's: tensors byte for byte, and the smallest config.

    Args:
        source: what was read; PEFT's LoRA can say it.
        hints: where the base is found; the config names the first one on the Hub.
        base_tensors: names of all the base's tensors, so that no pattern means too many.
    """
    tensors = peft.tensors_for(source)
    specs = [(name, tensors[name].dtype, tensors[name].shape) for name in sorted(tensors)]
    weights = chunks_of(specs, lambda name: (source.tensors.read(tensors[name].name),))
    repo = hub_repo(hints)
    config = peft.config_for(
        source,
        base_name=repo,
        revision=next((hint.revision for hint in hints if hint.repo == repo), None),
        base_tensors=base_tensors,
    )
    return {
        CONFIG_NAME: (canonical.encode(config),),
        peft.WEIGHTS_NAME: tuple(weights),
    }


def refuse_unsaid(source: AdapterSource) -> None:
    """Raise `LossyConversion` where PEFT's LoRA, which a package holds, cannot say it."""
    try:
        check_sayable(source)
    except LossyConversion as error:
        raise LossyConversion(
            "a package holds what PEFT's LoRA can say, and it cannot say "
            + "; ".join(error.losses),
            losses=error.losses,
            where=source.tensors.where,
            hint="attach the adapter as it is, or merge it with `lorahub merge`",
        ) from error


def refuse_links(src: Path) -> None:
    """Raise `FormatError` where a config or weights in the folder lie elsewhere.

    What a package holds is published; a link that came with the folder must not choose it.
    """
    try:
        found = sorted(src.iterdir())
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(src)) from error
    for path in found:
        if path.name == CONFIG_NAME or path.name.lower().endswith(WEIGHTS):
            _refuse_link(path)


def copied(src: Path, base: Path, names: Iterable[str]) -> dict[str, Chunks]:
    """Return licences, and what belongs to the tokenizer and is not the base's own."""
    files: dict[str, Chunks] = {}
    for name in names:
        role = layout.role_of(name)
        if role in ("license", "tokenizer"):
            _refuse_link(src / name)
            data = _read(src / name)
            if role == "license" or not _is_same(data, base / name):
                _refuse_code(name, data, src)
                files[name] = (data,)
    return files


def _refuse_code(name: str, data: bytes, src: Path) -> None:
    if name != TOKENIZER_CONFIG_NAME:
        return
    where = str(src / name)
    config = strict_json.decode_object(data, where=where, max_bytes=len(data))
    if config.get("auto_map"):
        raise FormatError(
            "auto_map names Python code that loaders are to run: it never travels in a "
            "package",
            where=where,
            hint="remove the key, or the file if the base's own tokenizer serves",
        )


def _refuse_link(path: Path) -> None:
    if links.leads_out(path, path.parent):
        raise FormatError(
            "this is a link that leads out of the folder: what lies there would travel "
            "in the package",
            where=str(path),
            hint="put the file itself in the link's place: cp --dereference",
        )


def _is_same(data: bytes, path: Path) -> bool:
    return path.is_file() and path.stat().st_size == len(data) and _read(path) == data


def readme(src: Path, names: Iterable[str]) -> str | None:
    if CARD_NAME not in names:
        return None
    _refuse_link(src / CARD_NAME)
    try:
        return _read(src / CARD_NAME).decode()
    except UnicodeDecodeError as error:
        raise InputError("is not UTF-8", where=str(src / CARD_NAME)) from error


def _read(path: Path) -> bytes:
    limit = layout.max_bytes(path.name)
    try:
        if not path.is_file():
            raise InputError("is no regular file", where=str(path))
        with path.open("rb") as stream:
            data = stream.read(limit + 1)
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from error
    if len(data) > limit:
        raise InputError(f"has more than {limit} bytes", where=str(path))
    if data.startswith(b"version https://git-lfs"):
        raise InputError(
            "this is a Git LFS pointer, not the file itself",
            where=str(path),
            hint="fetch the content with `git lfs pull`",
        )
    return data


def refuse_pickles(names: Iterable[str], src: Path) -> None:
    pickles = [name for name in names if name.lower().endswith(PICKLE_SUFFIXES)]
    if pickles:
        raise FormatError(
            f"the folder holds {', '.join(map(repr, pickles))}: pickles can run code "
            "and never travel in a package",
            where=str(src),
            hint="remove them; only adapter_model.safetensors is needed",
        )


def hub_repo(hints: Iterable[BaseHint]) -> str | None:
    """Return what the Hugging Face Hub calls the base, None where no hint says."""
    return next((hint.repo for hint in hints if hint.hub == "hf"), None)
