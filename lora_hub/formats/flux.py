"""FLUX.1's layers as Black Forest Labs name them, told as diffusers names them.

BFL's transformer keeps q, k and v (and the first layer of the MLP, in single blocks) in
one weight, one behind the other along the rows; diffusers keeps each by itself. So an
update of one layer becomes several that share `a` and take their rows of `b`: exact.

Only layers whose rows stand in the same order in both are in the table. HunyuanVideo and
FLUX.2 use some of the names for layers of other shapes, so the proportions are compared.

Source: black-forest-labs/flux, `modules/layers.py` (DoubleStreamBlock,
SingleStreamBlock); huggingface/diffusers, `loaders/lora_conversion_utils.py`
(`_convert_kohya_flux_lora_to_diffusers`, `_convert_xlabs_flux_lora_to_diffusers`).
"""

import re
from dataclasses import dataclass, replace

from lora_hub.errors import FormatError
from lora_hub.formats.factors import Factors


@dataclass(frozen=True, slots=True)
class _Layer:
    """One of BFL's layers: what diffusers calls its parts, and sizes in hidden sizes.

    Attributes:
        parts: name in diffusers' block → its rows.
    """

    parts: dict[str, int]
    columns: int = 1

    @property
    def rows(self) -> int:
        return sum(self.parts.values())


# Last part of BFL's name, with "_" for its dots.
_DOUBLE = {
    "img_attn_qkv": _Layer({"attn.to_q": 1, "attn.to_k": 1, "attn.to_v": 1}),
    "img_attn_proj": _Layer({"attn.to_out.0": 1}),
    "img_mlp_0": _Layer({"ff.net.0.proj": 4}),
    "img_mlp_2": _Layer({"ff.net.2": 1}, columns=4),
    "img_mod_lin": _Layer({"norm1.linear": 6}),
    "txt_attn_qkv": _Layer(
        {"attn.add_q_proj": 1, "attn.add_k_proj": 1, "attn.add_v_proj": 1}
    ),
    "txt_attn_proj": _Layer({"attn.to_add_out": 1}),
    "txt_mlp_0": _Layer({"ff_context.net.0.proj": 4}),
    "txt_mlp_2": _Layer({"ff_context.net.2": 1}, columns=4),
    "txt_mod_lin": _Layer({"norm1_context.linear": 6}),
}
_SINGLE = {
    "linear1": _Layer({"attn.to_q": 1, "attn.to_k": 1, "attn.to_v": 1, "proj_mlp": 4}),
    "linear2": _Layer({"proj_out": 1}, columns=5),
    "modulation_lin": _Layer({"norm.linear": 3}),
}
# Names of BFL's blocks → what diffusers calls them, and their layers.
_BLOCKS = {
    "double": ("transformer.transformer_blocks", _DOUBLE),
    "single": ("transformer.single_transformer_blocks", _SINGLE),
}
# XLabs trains the attention of double blocks, in processors of its own.
_XLABS = {
    "processor_qkv_lora1": "img_attn_qkv",
    "processor_proj_lora1": "img_attn_proj",
    "processor_qkv_lora2": "txt_attn_qkv",
    "processor_proj_lora2": "txt_attn_proj",
}

_NAME = re.compile(r"(double|single)_blocks[._](\d+)[._](.+)")


def is_block(module: str) -> bool:
    """Return whether a path, with dots or "_" for them, lies in one of BFL's blocks."""
    return _NAME.fullmatch(module) is not None


def in_diffusers(part: Factors, where: str) -> list[Factors]:
    """Return the update, whose target is BFL's path, as updates of diffusers' layers.

    Raises:
        FormatError: the layer is not in the table, or has not FLUX.1's proportions.
    """
    match = _NAME.fullmatch(part.target)
    blocks, layers = _BLOCKS[match[1]] if match else ("", {})
    last = match[3].replace(".", "_") if match else ""
    layer = layers.get(_XLABS.get(last, last))
    if match is None or layer is None:
        raise FormatError(
            f"{part.target} is no layer of FLUX.1's blocks that is known to lie alike in "
            "diffusers",
            where=where,
        )
    rows, columns = part.b.shape[0], part.a.shape[1]
    if part.layer != "linear" or rows * layer.columns != columns * layer.rows:
        raise FormatError(
            f"{part.target}: the factors are {list(part.a.shape)} and "
            f"{list(part.b.shape)}; FLUX.1 has {layer.rows} outputs for "
            f"{layer.columns} inputs there, so this is another model",
            where=where,
        )
    size = rows // layer.rows
    if size * layer.rows != rows:
        raise FormatError(
            f"{part.target}: {rows} rows are no {layer.rows} equal parts", where=where
        )
    found, start = [], 0
    for name, count in layer.parts.items():
        stop = start + count * size
        magnitude = part.magnitude
        found.append(
            replace(
                part,
                target=f"{blocks}.{int(match[2])}.{name}",
                b=part.b.rows(start, stop),
                magnitude=magnitude.rows(start, stop) if magnitude else None,
            )
        )
        start = stop
    return found
