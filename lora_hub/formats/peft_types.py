"""Every `peft_type` there is: which are read, and why the others are not.

A row a type. LoRA itself is read by `peft.py`; a type in `READERS` has a file of its own
that says it in the same normal form, exactly; of the others `check_type` tells what they
do and what can be done with them. No type is taken for LoRA because its name is unknown.

Source: PEFT 0.21.2, `utils/peft_types.py` and the tuners' `layer.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from lora_hub.errors import FormatError
from lora_hub.formats.source import AdapterSource
from lora_hub.tensors.file import TensorFile


class Reader(Protocol):
    """Reads one type: the object in `adapter_config.json`, and the tensors beside it.

    `where` is the directory, for messages; `base` the base's folder where the caller named
    one. Raises `FormatError`.
    """

    def __call__(
        self,
        config: Mapping[str, Any],
        tensors: TensorFile,
        where: str,
        base: Path | None = None,
    ) -> AdapterSource: ...


def _of(module: str, name: str) -> Reader:
    """Return a reader that imports its file when it is called.

    The files look into the config with `peft_config.py`, which asks this table.
    """

    def read(
        config: Mapping[str, Any],
        tensors: TensorFile,
        where: str,
        base: Path | None = None,
    ) -> AdapterSource:
        reader: Reader = getattr(import_module(f"lora_hub.formats.{module}"), name)
        return reader(config, tensors, where, base)

    return read


READERS: Mapping[str, Reader] = {
    "ADALORA": _of("peft_adalora", "read_adalora"),
    "IA3": _of("peft_ia3", "read_ia3"),
    "LN_TUNING": _of("peft_norms_and_tokens", "read_ln_tuning"),
    "LOHA": _of("peft_loha", "read_loha"),
    "LOKR": _of("peft_lokr", "read_lokr"),
    "PVERA": _of("peft_vera", "read_vera"),
    "TRAINABLE_TOKENS": _of("peft_norms_and_tokens", "read_trainable_tokens"),
    "VERA": _of("peft_vera", "read_vera"),
}

_NEAREST = (
    "PEFT's convert_to_lora gives the nearest LoRA, and its merge_and_unload a checkpoint "
    "without adapter"
)
_MERGE = "PEFT's merge_and_unload gives a checkpoint without adapter"
_NONE = "it works in PEFT alone; nothing turns it into a change of weights"


@dataclass(frozen=True, slots=True)
class _Method:
    """What a method does, why that is no sum of low-rank updates, and the way out."""

    title: str
    does: str
    way_out: str


_PROMPT = "no weight of the base changes"

NOT_READ: Mapping[str, _Method] = {
    "ADAMSS": _Method(
        "AdaMSS", "subspaces that PEFT computes from the base are trained", _MERGE
    ),
    "ADAPTION_PROMPT": _Method(
        "adaption prompt", f"trained tokens enter the attention, {_PROMPT}", _NONE
    ),
    "BEFT": _Method("BEFT", "the value projections got biases of their own", _NONE),
    "BOFT": _Method(
        "BOFT",
        "the weight is multiplied by rotations, which is no change of low rank",
        _MERGE,
    ),
    "BONE": _Method("Bone", "an early MiSS, which PEFT itself reads no more", _NONE),
    "C3A": _Method("C3A", "circulant matrices are added, whose rank is full", _NEAREST),
    "CARTRIDGE": _Method(
        "cartridge", f"a trained cache of keys and values, {_PROMPT}", _NONE
    ),
    "CPT": _Method("CPT", f"trained tokens in front of the input, {_PROMPT}", _NONE),
    "DEFT": _Method("DEFT", "a part of the weight is projected away", _MERGE),
    "DELORA": _Method(
        "DeLoRA", "the factors are divided by norms, which rounds anew", _NEAREST
    ),
    "FOURIERFT": _Method(
        "FourierFT", "a Fourier transform is added, whose rank is full", _NEAREST
    ),
    "FROD": _Method("FRoD", "the whole weight is replaced by a product", _MERGE),
    "GLORA": _Method("GLoRA", "the change depends on the base's weight and bias", _MERGE),
    "GRALORA": _Method(
        "GraLoRA", "the factors work by blocks and exchange between them", _NEAREST
    ),
    "HIRA": _Method("HiRA", "the factors multiply the weight, number by number", _MERGE),
    "HRA": _Method(
        "HRA",
        "the weight is multiplied by reflections, which is no change of low rank",
        _MERGE,
    ),
    "LILY": _Method("Lily", "layers share factors, mixed anew for every input", _NONE),
    "MISS": _Method("MiSS", "one shared block is added along the inputs", _NEAREST),
    "MULTITASK_PROMPT_TUNING": _Method(
        "multitask prompt tuning", f"trained tokens in front of the input, {_PROMPT}", _NONE
    ),
    "OFT": _Method(
        "OFT",
        "the weight is multiplied by a rotation, which is no change of low rank",
        _MERGE,
    ),
    "OSF": _Method("OSF", "the weight's own singular vectors are trained", _MERGE),
    "PEANUT": _Method("PEANuT", "a network computes the change from the weight", _MERGE),
    "POLY": _Method("Poly", "a router mixes factors for each task", _NONE),
    "PREFIX_TUNING": _Method(
        "prefix tuning", f"trained keys and values in front of the input, {_PROMPT}", _NONE
    ),
    "PROMPT_TUNING": _Method(
        "prompt tuning", f"trained tokens in front of the input, {_PROMPT}", _NONE
    ),
    "PSOFT": _Method(
        "PSOFT", "a rotation stands between factors computed from the base", _NEAREST
    ),
    "P_TUNING": _Method(
        "P-tuning", f"trained tokens in front of the input, {_PROMPT}", _NONE
    ),
    "RANDLORA": _Method(
        "RandLoRA", "many random factors are added, whose rank is full", _NEAREST
    ),
    "ROAD": _Method("RoAd", "the outputs are rotated in pairs", _MERGE),
    "SHADOW": _Method("ShadowPEFT", "a second network runs beside the base", _NONE),
    "SHIRA": _Method("SHiRA", "single numbers are changed, whose rank is full", _MERGE),
    "SUPERTUNING": _Method(
        "super-tuning", "single numbers are changed, whose rank is full", _MERGE
    ),
    "TINYLORA": _Method(
        "TinyLoRA", "the factors are singular vectors of the base", _NEAREST
    ),
    "UNILORA": _Method(
        "Uni-LoRA", "the factors are picked from one shared vector", _NEAREST
    ),
    "VBLORA": _Method(
        "VB-LoRA",
        "the factors are mixed from a bank by softmax, which rounds anew",
        _NEAREST,
    ),
    "WAVEFT": _Method(
        "WaveFT", "a wavelet transform is added, whose rank is full", _NEAREST
    ),
    "XLORA": _Method("X-LoRA", "a classifier mixes adapters for every token", _NONE),
}


def check_type(config: Mapping[str, Any], where: str) -> None:
    """Raise `FormatError` unless the config's `peft_type` is LORA or one of `READERS`.

    Args:
        config: the object in `adapter_config.json`.
        where: its path, for messages.
    """
    peft_type = config.get("peft_type")
    if peft_type == "LORA" or (isinstance(peft_type, str) and peft_type in READERS):
        return
    read = ", ".join(["LORA", *sorted(READERS)])
    if peft_type is None:
        raise FormatError("peft_type is missing", where=where, hint=f"read are {read}")
    method = NOT_READ.get(peft_type) if isinstance(peft_type, str) else None
    if method is None:
        raise FormatError(
            f"peft_type is {_short(peft_type)}, which PEFT 0.21 does not know",
            where=where,
            hint=f"read are {read}",
        )
    raise FormatError(
        f"peft_type is {peft_type!r} ({method.title}: {method.does}), which is not read",
        where=where,
        hint=f"read are {read}; {method.way_out}",
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
