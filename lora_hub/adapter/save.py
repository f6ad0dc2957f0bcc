"""`Adapter` → a PEFT directory, or the `AdapterSource` that such a directory would be.

A file has one alpha for each target, an update one scaling for each row. Where the rows
agree, the factors keep their bits. Where they do not, as in a sum of adapters with unlike
weights, `b` takes up the difference, rounded once.
"""

import math
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from lora_hub import atomic, canonical
from lora_hub.adapter.adapter import Adapter
from lora_hub.adapter.tensor_bytes import NAMES, to_bytes
from lora_hub.adapter.update import Update
from lora_hub.errors import FormatError
from lora_hub.formats import peft, peft_config
from lora_hub.formats.source import AdapterSource, UpdateSource
from lora_hub.scaling import ScalingRule, scaling
from lora_hub.tensors.file import TensorFile
from lora_hub.tensors.write import chunks_of, write_tensors

_RULE: ScalingRule = "alpha/r"


def save(adapter: Adapter, folder: Path, *, base_name: str | None = None) -> None:
    """Write the adapter as a folder that PEFT loads with the same effect.

    The folder must not exist yet; it is there whole or not at all. `base_name` is what to
    call the base, the adapter's own `base_name` by default.

    Raises:
        FormatError: as `to_source`.
        StoreError: the folder exists and is not empty, or cannot be written.
    """
    source = to_source(adapter)
    config = peft.config_for(source, base_name=base_name or adapter.base_name)
    infos = source.tensors.header.tensors.values()
    specs = [(info.name, info.dtype, info.shape) for info in infos]
    with atomic.new_folder(folder) as temporary:
        atomic.replace(temporary / peft_config.CONFIG_NAME, [canonical.encode(config)])
        write_tensors(temporary / peft.WEIGHTS_NAME, specs, source.tensors.chunks)


def to_source(adapter: Adapter) -> AdapterSource:
    """Return what a PEFT directory of this adapter would say, its bytes in memory.

    Factors keep dtype and bits where all rows of an update have one scaling up to its
    sign. Elsewhere the most common scaling is kept, and the columns of `b` that have
    another one are multiplied by the ratio: in the dtype of the factors where that is
    exact, else rounded once to float32 (float64 stays).

    Raises:
        FormatError: an update holds p, q or a bias, which plain LoRA cannot say.
    """
    alphas: dict[str, float] = {}
    factors: dict[str, Tensor] = {}
    for target, update in sorted(adapter.updates.items()):
        _check_low_rank(target, update)
        alphas[target], a, b = _with_one_alpha(update)
        factors.update(zip(peft.tensor_names(target), (a, b), strict=True))
    file = _file(factors, where=adapter.name or "the adapter")
    return AdapterSource(
        updates=tuple(_update(file, target, alpha) for target, alpha in alphas.items()),
        tensors=file,
        base_name=adapter.base_name,
        task_type=adapter.task_type,
    )


def _update(file: TensorFile, target: str, alpha: float) -> UpdateSource:
    a, b = map(file.info, peft.tensor_names(target))
    return UpdateSource(target=target, rank=a.shape[0], alpha=alpha, rule=_RULE, a=a, b=b)


def _check_low_rank(target: str, update: Update) -> None:
    terms = {"p (rows)": update.p, "q (columns)": update.q, "a bias": update.bias}
    held = [name for name, term in terms.items() if term is not None]
    if held:
        raise FormatError(
            f"the update scales or shifts the base by {', '.join(held)}, which a LoRA "
            "file cannot say",
            where=target,
            hint="merge the adapter into its base instead",
        )


def _with_one_alpha(update: Update) -> tuple[float, Tensor, Tensor]:
    """Return alpha, a and b with `alpha / rank * b @ a` equal to the update."""
    # The absolute value: a sign goes into b without rounding, and tools that expect a
    # positive alpha stay content. Of two equally common ones the larger, so that ratios
    # stay below one and the order of rows has no say.
    counts = Counter(update.scaling.abs().tolist())
    common = max(counts, key=lambda value: (counts[value], value))
    alpha = _alpha(common, update.rank)
    ratio = update.scaling / common if common else torch.ones_like(update.scaling)
    dtype = torch.promote_types(update.a.dtype, update.b.dtype)
    exact = update.b.double() * ratio
    if not torch.equal(exact.to(dtype).double(), exact):
        dtype = torch.promote_types(dtype, torch.float32)
    return alpha, update.a.to(dtype), exact.to(dtype)


def _alpha(wanted: float, rank: int) -> float:
    """Return the alpha whose scaling is `wanted`, or the nearest one there is."""
    middle = wanted * rank
    near = (middle, math.nextafter(middle, math.inf), math.nextafter(middle, 0.0))
    return min(near, key=lambda alpha: abs(scaling(alpha, rank, _RULE) - wanted))


def _file(factors: dict[str, Tensor], *, where: str) -> TensorFile:
    specs = [
        (name, NAMES[tensor.dtype], tuple(tensor.shape))
        for name, tensor in sorted(factors.items())
    ]
    data = b"".join(chunks_of(specs, lambda name: [to_bytes(factors[name])]))
    return TensorFile.from_bytes(data, where=where)
