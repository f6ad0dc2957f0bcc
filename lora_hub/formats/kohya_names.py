"""Which module of a base a mangled name of sd-scripts means.

The name is a path with `_` in place of its dots, so only a list of paths can be asked. For
SDXL the path is that of Stability's own U-Net (`input_blocks.4.1`), for FLUX that of Black
Forest Labs' transformer (`flux.py`); both are looked up under diffusers' names.

Source: kohya-ss/sd-scripts 02298e3, `networks/lora.py`; for SDXL its
`library/sdxl_model_util.py:make_unet_conversion_map`; for the prefix `lycoris`
KohakuBlueleaf/LyCORIS, `wrapper.py`.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from lora_hub.errors import FormatError
from lora_hub.formats import base_names, flux
from lora_hub.formats.base_names import Shapes

# prefix → component. sd-scripts counts text encoders from 1 where there are several;
# LyCORIS takes any model as one.
COMPONENTS = {
    "lora_unet": "unet",
    "lora_te": "text_encoder",
    "lora_te1": "text_encoder",
    "lora_te2": "text_encoder_2",
    "lora_te3": "text_encoder_3",
    "lycoris": "",
}

_FLUX = re.compile(r"lora_unet_((?:double|single)_blocks_\d+_.+)")

# The parts of a residual block: Stability's names and diffusers'.
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_SDXL_BLOCKS = 3


def meanings(
    names: Iterable[str], base: Path | None, where: str
) -> dict[str, tuple[str, tuple[int, ...] | None]]:
    """Return mangled name → its target, and the shape of the base's weight.

    A layer of FLUX stands for several: its target is BFL's path, and there is no shape.

    Raises:
        FormatError: no base was given, or a name fits no module of it or several.
    """
    if base is None:
        raise FormatError(
            "names of sd-scripts have '_' in place of dots: only the base's list of "
            "modules tells what they mean",
            where=where,
            hint="give the folder of the base with --base",
        )
    known = base_names.modules_of(base)
    meant = _mangled(known)
    targets: dict[str, tuple[str, tuple[int, ...] | None]] = {}
    for name in names:
        found = meant.get(name, [])
        match = _FLUX.fullmatch(name)
        if not found and match and flux.is_block(match[1]) and "transformer" in known:
            targets[name] = match[1], None
            continue
        if not found:
            raise FormatError(_unknown(name, base), where=where)
        if len(found) > 1:
            paths = " or ".join(sorted(target for target, _ in found))
            raise FormatError(f"{name} may be {paths}: the base has both", where=where)
        targets[name] = found[0]
    check_distinct((target for target, _ in targets.values()), where)
    return targets


def check_distinct(targets: Iterable[str], where: str) -> None:
    """Raise `FormatError` where two names mean one target."""
    twice = [target for target, count in Counter(targets).items() if count > 1]
    if twice:
        raise FormatError(f"two names mean {twice[0]}", where=where)


def check_in_base(targets: Iterable[str], base: Path, where: str) -> None:
    """Raise `FormatError` unless the base, a pipeline, has all the targets."""
    known = base_names.modules_of(base)
    for target in targets:
        component, path = base_names.of_component(target)
        if path not in known.get(component, ()):
            raise FormatError(f"the base {base} has no layer {target}", where=where)


def prefixes(components: Collection[str]) -> dict[str, str]:
    """Return component → prefix, as sd-scripts gives it to a model with these."""
    several = bool({"text_encoder_2", "text_encoder_3"} & set(components))
    first = "lora_te1" if several else "lora_te"
    return {
        "unet": "lora_unet",
        "text_encoder": first,
        "text_encoder_2": "lora_te2",
        "text_encoder_3": "lora_te3",
    }


def _mangled(
    known: Mapping[str, Shapes],
) -> dict[str, list[tuple[str, tuple[int, ...] | None]]]:
    """Return every name that sd-scripts could give to a module → what it means."""
    meant: dict[str, list[tuple[str, tuple[int, ...] | None]]] = {}
    for prefix, component in COMPONENTS.items():
        # A checkpoint that is no pipeline can only be what the file speaks of.
        shapes = known.get(component, known.get("", {}))
        sdxl = _sdxl_names(shapes) if component == "unet" else {}
        for path, shape in shapes.items():
            target = f"{component}.{path}" if component else path
            for said in {path, sdxl.get(path, path)}:
                name = f"{prefix}_{said.replace('.', '_')}"
                meant.setdefault(name, []).append((target, shape))
    return meant


def _unknown(name: str, base: Path) -> str:
    for prefix in COMPONENTS:
        if name.startswith(f"{prefix}_{prefix}_"):
            return f"{name} has its prefix twice: a broken conversion"
    return f"the base {base} has no layer that sd-scripts would call {name}"


# ── SDXL ─────────────────────────────────────────────────────────────────────────────


def _sdxl_names(paths: Collection[str]) -> dict[str, str]:
    """Return diffusers' path → Stability's, {} unless the U-Net has SDXL's three blocks."""
    blocks = {
        match[1] for path in paths if (match := re.match(r"down_blocks\.(\d+)", path))
    }
    if len(blocks) != _SDXL_BLOCKS:
        return {}
    starts = _sdxl_starts()
    found = {}
    for path in paths:
        for start, theirs in starts.items():
            if path == start or path.startswith(f"{start}."):
                rest = path[len(start) + 1 :]
                rest = _RESNET.get(rest, rest) if ".resnets." in start else rest
                found[path] = f"{theirs}.{rest}" if rest else theirs
    return found


def _sdxl_starts() -> dict[str, str]:
    """Return the beginning of diffusers' paths → Stability's."""
    starts = {
        "conv_in": "input_blocks.0.0",
        "conv_out": "out.2",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.resnets.1": "middle_block.2",
    }
    for block in range(_SDXL_BLOCKS):
        for layer in range(2):
            at = f"input_blocks.{3 * block + layer + 1}"
            starts[f"down_blocks.{block}.resnets.{layer}"] = f"{at}.0"
            starts[f"down_blocks.{block}.attentions.{layer}"] = f"{at}.1"
        for layer in range(3):
            at = f"output_blocks.{3 * block + layer}"
            starts[f"up_blocks.{block}.resnets.{layer}"] = f"{at}.0"
            starts[f"up_blocks.{block}.attentions.{layer}"] = f"{at}.1"
        down = f"input_blocks.{3 * (block + 1)}.0.op"
        starts[f"down_blocks.{block}.downsamplers.0.conv"] = down
        # Behind the residual block and the attention of SDXL's up blocks.
        up = f"output_blocks.{3 * block + 2}.2.conv"
        starts[f"up_blocks.{block}.upsamplers.0.conv"] = up
    return starts
