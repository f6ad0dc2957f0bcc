"""The names that tensors have in files of diffusers: which module, and which part of it.

    unet.<module>.lora_A.weight                       PEFT's names
    unet.<module>.lora.down.weight                    and ….lora_linear_layer.down.weight
    unet.<…attn1>.processor.to_q_lora.down.weight     attention processors, before 2023-09
    double_blocks.0.img_attn.qkv.lora_A.weight        FLUX.1 as BFL and ComfyUI do
    double_blocks.0.processor.qkv_lora1.down.weight   FLUX.1 as XLabs does

Source: huggingface/diffusers 0023a2c, `utils/state_dict_utils.py`.
"""

import re
from collections.abc import Collection, Iterable

from lora_hub.errors import FormatError
from lora_hub.formats import base_names, flux

# Layout → what follows the module's path; "part" belongs to the path.
_LAYOUTS = (
    # The processors first: their to_q_lora is no module of the second layout.
    re.compile(
        r"(?P<module>.+)\.(?P<part>to_(?:q|k|v|out))_lora\.(?P<which>down|up)\.weight"
    ),
    re.compile(r"(?P<module>.+)\.lora(?:_linear_layer)?\.(?P<which>down|up)\.weight"),
    re.compile(r"(?P<module>.+)\.lora_(?P<which>[AB])\.weight"),
    re.compile(
        r"(?P<module>.+)\.(?P<which>lora_magnitude_vector|dora_scale|lora_B\.bias)(?:\.weight)?"
    ),
    re.compile(r"(?P<module>.+)\.(?P<which>alpha)"),
)
# As ComfyUI and XLabs have them, of FLUX.1's blocks alone.
_OF_FLUX = (
    re.compile(r"(?P<module>.+)\.lora_(?P<which>down|up)\.weight"),
    re.compile(
        r"(?P<module>.+\.processor\.(?:qkv|proj)_lora\d?)\.(?P<which>down|up)\.weight"
    ),
)
_WHICH = {
    "A": "a",
    "B": "b",
    "alpha": "alpha",
    "dora_scale": "magnitude",
    "down": "a",
    "lora_B.bias": "bias",
    "lora_magnitude_vector": "magnitude",
    "up": "b",
}
_COMFY = "diffusion_model."  # what ComfyUI puts in front of BFL's names
_PROCESSOR = re.compile(r"\.processor(?=\.|$)")

# What attention processors called the layers of a U-Net, and of a text encoder.
_PARTS = {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out": "to_out.0"}
_TEXT_PARTS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def evidence(names: Collection[str]) -> str | None:
    """Return why a file with these names is one of diffusers, or None."""
    if all(base_names.of_component(name)[0] for name in names):
        return "every tensor begins with a component of a pipeline (unet., text_encoder.)"
    if all(_LAYOUTS[0].fullmatch(name) for name in names):
        return "every tensor is of an attention processor (….processor.to_q_lora.…)"
    if all(_is_of_flux(name) for name in names):
        return "every tensor is of a block of FLUX.1 in BFL's names (double_blocks.…)"
    return None


def check_components(names: Iterable[str], where: str) -> None:
    """Raise `FormatError` unless all names begin with a component, or none does.

    Files from before there were several are of a U-Net; names that stand beside a
    component's are of nothing that is known.
    """
    without, with_one = None, None
    for name in names:
        if base_names.of_component(name)[0]:
            with_one = name
        elif not _is_of_flux(name):
            without = name
    if without is not None and with_one is not None:
        raise FormatError(
            f"the tensor {without!r} begins with no component of a pipeline, and "
            f"{with_one!r} does",
            where=where,
        )


def parse(name: str, where: str) -> tuple[str, str]:
    """Return a tensor's target, and what it is of it: a, b, alpha, magnitude or bias.

    A layer of FLUX.1 in BFL's names has its path there, behind `transformer.`.

    Raises:
        FormatError: the name is in none of the layouts.
    """
    layouts = (*_LAYOUTS, *_OF_FLUX) if _is_of_flux(name) else _LAYOUTS
    for layout in layouts:
        match = layout.fullmatch(name)
        if match:
            module = _whole(match["module"])
            part = match.groupdict().get("part")
            if part:
                names = _TEXT_PARTS if module.startswith("text_encoder") else _PARTS
                module = f"{module}.{names[part]}"
            return module, _WHICH[match["which"]]
    raise FormatError(
        f"the tensor {name!r} is no low-rank factor of diffusers, in none of its layouts",
        where=where,
    )


def _is_of_flux(name: str) -> bool:
    return flux.is_block(name.removeprefix(_COMFY))


def _whole(module: str) -> str:
    """Return the path with its component and without the processor, which is no module."""
    if _is_of_flux(module):
        return f"transformer.{module.removeprefix(_COMFY)}"
    module = _PROCESSOR.sub("", module)
    return module if base_names.of_component(module)[0] else f"unet.{module}"
