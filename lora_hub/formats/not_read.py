"""What is said of files that are no adapter that is read: whose they are, what to do.

`_CONFIGS` and `_NAMES` know the schemas and the names of tensors that look alike. Nothing
is raised here: `detect.py` does.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lora_hub.errors import FormatError
from lora_hub.formats.dialect import Dialect, Glance
from lora_hub.formats.files import CONFIG_NAME, WEIGHTS, Files
from lora_hub.tensors.foreign import PICKLE_SUFFIXES

# Several files in one: what lies in them is not looked at.
_ARCHIVES = (".7z", ".gz", ".npz", ".rar", ".tar", ".tgz", ".xz", ".zip", ".zst")

_SHARD = re.compile(r"-\d+-of-\d+\.safetensors$", re.IGNORECASE)

_HINT = "give a folder saved by PEFT: adapter_config.json, adapter_model.safetensors"

# Keys found together in an adapter_config.json → whose it is.
_CONFIGS = (
    ({"model_class", "model_type"}, "AdapterHub's"),
    ({"config", "hidden_size"}, "AdapterHub's"),
    ({"module_path", "rank"}, "one of qwix or tunix (JAX)"),
    ({"num_virtual_tokens"}, "one of prompt tuning, which changes no weight"),
    ({"adapter_type", "adapter_dim"}, "NeMo's"),
)

# What the names in a header look like → whose they are, where no dialect knows them.
_NAMES = (
    (
        re.compile(r"base_model\.model\..+"),
        f"PEFT's, and no {CONFIG_NAME} is there: without it nobody knows the scaling",
    ),
    (
        re.compile(r"(diffusion_model|lora_transformer)[._].+|double_stream_blocks\..+"),
        "ComfyUI's for a model other than FLUX.1, whose layers are not known here",
    ),
    (
        re.compile(r".+\.(loras|adapters|prefix_tunings?)\..+|heads\..+"),
        "AdapterHub's, which is not read",
    ),
    (
        re.compile(r".+\.linear_(in|out)\.weight"),
        "NeMo's or Megatron's, with q, k and v in one: not read",
    ),
    (
        re.compile(r".+[._/](w|kernel)_lora_[ab]|params/.+"),
        "of qwix or tunix (JAX), which are not read",
    ),
    (
        re.compile(r"(.+\.)?(prompt_embeddings|prompt_encoder|prefix_encoder)(\..+)?"),
        "of prompt or prefix tuning: trained tokens, which change no weight",
    ),
    (
        re.compile(r"(?!.*lora).+\.(weight|bias)"),
        "of a whole model, no factor among them: a base is given beside an adapter",
    ),
    (
        re.compile(r"[^.]+"),
        "home-made, without paths of modules: only their author knows what each changes",
    ),
)


def ambiguous(claims: Sequence[tuple[Dialect, str]], where: str) -> FormatError:
    """Return what to raise where two dialects could be meant, on what evidence each."""
    readings = "; or as ".join(f"{dialect.title}'s: {said}" for dialect, said in claims)
    names = " or ".join(dialect.name for dialect, _ in claims)
    return FormatError(
        f"can be read as {readings}",
        where=where,
        hint=f"say which with --from: {names}",
    )


def unclaimed(
    glances: Sequence[Glance], files: Files, dialects: Collection[str]
) -> FormatError:
    """Return what to raise where no dialect claims any of the files."""
    if len(glances) > 1:
        return without_config(files)
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
        hint=f"dialects: {', '.join(dialects)}",
    )


def without_config(files: Files) -> FormatError:
    """Return what to raise where there is no config, and no file that speaks for itself."""
    weights, pickles = having(files.names, *WEIGHTS), having(files.names, *PICKLE_SUFFIXES)
    said = f"there is no {CONFIG_NAME}: no adapter is here"
    if weights:
        said = (
            f"there is no {CONFIG_NAME} beside {weights[0]!r}: without it nobody knows the "
            "scaling of the factors"
        )
    elif pickles:
        said = (
            f"there is no {CONFIG_NAME}, and {pickles[0]!r} is a pickle, which is never "
            "read"
        )
    elif archives := having(files.names, *_ARCHIVES):
        said = (
            f"there is no {CONFIG_NAME}, and {archives[0]!r} is an archive, which is never "
            "opened"
        )
        return FormatError(
            said, where=files.where, hint=_inner(files) or _unpacking(archives[0])
        )
    return FormatError(said, where=files.where, hint=_inner(files) or _HINT)


def without_weights(dialect: Dialect, files: Files) -> FormatError:
    """Return what to raise where there is a config and not the file beside it."""
    weights, pickles = (
        having(files.names, ".safetensors"),
        having(files.names, *PICKLE_SUFFIXES),
    )
    if weights:
        return FormatError(
            f"there is no {dialect.weights_name}; found {', '.join(map(repr, weights))}",
            where=files.where,
            hint=_renaming(weights, dialect),
        )
    if pickles:
        return FormatError(
            f"{pickles[0]!r} is a pickle, which can run code and is never read",
            where=files.where,
            hint="load it where you trust it and save it again with PEFT 0.18 or later",
        )
    archives = having(files.names, *_ARCHIVES)
    if archives:
        return FormatError(
            f"there is no {dialect.weights_name}, and {archives[0]!r} is an archive, which "
            "is never opened",
            where=files.where,
            hint=_unpacking(archives[0]),
        )
    return FormatError(
        f"there is no {dialect.weights_name}",
        where=files.where,
        hint=_inner(files) or "the download or the training ended before it was written",
    )


def only_weights(files: Files) -> str | None:
    """Return the one safetensors file in the folder, None where none or several are."""
    weights = having(files.names, ".safetensors")
    is_whole = len(weights) == 1 and not _SHARD.search(weights[0])
    return weights[0] if is_whole else None


def _renaming(weights: Sequence[str], dialect: Dialect) -> str:
    if any(_SHARD.search(name) for name in weights):
        return f"the adapter is in parts: save it in one {dialect.weights_name}"
    return (
        f"if that is the adapter's file, rename it to {dialect.weights_name}, or give "
        "`lorahub convert` or `inspect` the file itself"
    )


def _unpacking(name: str) -> str:
    if name.lower().endswith(".npz"):
        return "save it as safetensors: mx.save_safetensors of what mx.load gives"
    return "unpack it where you trust it, and give the folder"


def foreign_config(config: Mapping[str, Any], where: str) -> FormatError:
    """Return what to raise for a config that no dialect claims."""
    whose = "none that is known: it names no peft_type"
    for keys, owner in _CONFIGS:
        if keys <= config.keys():
            whose = f"{owner}, which is not read"
            break
    return FormatError(f"the config is {whose}", where=where, hint=_HINT)


def having(names: Collection[str], *suffixes: str) -> list[str]:
    """Return the names with one of these endings, in order."""
    return sorted(name for name in names if name.lower().endswith(suffixes))


def _inner(files: Files) -> str | None:
    if not files.inner:
        return None
    return f"adapters lie in folders of it, give one: {', '.join(files.inner[:3])}"
