"""Small adapters and bases by hand, so that each test says which numbers it is about."""

import json

from safetensors.torch import save, save_file

from lora_hub.formats.source import AdapterSource, Replacement, ScaleSource, UpdateSource
from lora_hub.tensors.file import TensorFile


def source(tensors, *, updates=(), scales=(), replacements=(), **fields):
    """Return an adapter over the tensors.

    `updates` are (target, name of a, name of b, further fields), `scales` are (target,
    axis, name), `replacements` are (name of the base's, role, name, rows).
    """
    file = TensorFile.from_bytes(save(tensors), where="adapter.safetensors")

    def update(target, a, b, **more):
        vectors = {
            key: file.info(more.pop(key)) for key in ("magnitude", "bias") if key in more
        }
        plain = {"rank": tensors[a].shape[0], "alpha": 3.0, "rule": "alpha/r"}
        return UpdateSource(
            target=target, a=file.info(a), b=file.info(b), **plain | more, **vectors
        )

    return AdapterSource(
        updates=tuple(
            update(*each[:3], **(each[3] if len(each) > 3 else {})) for each in updates
        ),
        tensors=file,
        scales=tuple(
            ScaleSource(target, axis, file.info(name)) for target, axis, name in scales
        ),
        replacements=tuple(
            Replacement(name, role, file.info(held), rows)
            for name, role, held, rows in replacements
        ),
        **fields,
    )


def base(folder, tensors, **config):
    """Write a checkpoint of these tensors, one file."""
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder
