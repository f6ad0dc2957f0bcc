"""`Adapter` → a PEFT directory, or the `AdapterSource` that such a directory would be.

A file has one alpha for each target, an update one scaling for each row. Where the rows
agree, the factors keep their bits. Where they do not, as in a sum of adapters with unlike
weights, `b` takes up the difference, rounded once. What PEFT's names and config are is
told in `formats/peft_write.py`, and what it cannot say is refused there.
"""

import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from lora_hub import atomic, canonical
from lora_hub.adapter.adapter import Adapter
from lora_hub.adapter.tensor_bytes import NAMES, to_bytes
from lora_hub.adapter.update import Update
from lora_hub.errors import FormatError
from lora_hub.formats import peft
from lora_hub.formats.files import CONFIG_NAME
from lora_hub.formats.source import AdapterSource, Replacement, UpdateSource
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
        LossyConversion: PEFT cannot say the whole adapter.
        StoreError: the folder exists and is not empty, or cannot be written.
    """
    source = to_source(adapter)
    config = peft.config_for(source, base_name=base_name or adapter.base_name)
    tensors = peft.tensors_for(source)
    specs = [(name, tensors[name].dtype, tensors[name].shape) for name in sorted(tensors)]
    with atomic.new_folder(folder) as temporary:
        atomic.replace(temporary / CONFIG_NAME, [canonical.encode(config)])
        write_tensors(
            temporary / peft.WEIGHTS_NAME,
            specs,
            lambda name: source.tensors.chunks(tensors[name].name),
        )


def to_source(adapter: Adapter) -> AdapterSource:
    """Return what a PEFT directory of this adapter would say, its bytes in memory.

    Factors keep dtype and bits where all rows of an update have one scaling up to its
    sign. Elsewhere the most common scaling is kept, and the columns of `b` that have
    another one are multiplied by the ratio: in the dtype of the factors where that is
    exact, else rounded once to float32 (float64 stays). Magnitudes and biases take the
    narrowest dtype that holds them; a bias whose quotient by the scaling is none of its
    own is rounded once. As PEFT has a bias for all targets or none, others get one of zero.

    Raises:
        FormatError: an update scales the base's weight (p, q), which plain LoRA cannot
            say; or it has no factors.
    """
    tensors: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    has_bias = any(update.bias is not None for update in adapter.updates.values())
    for target, update in sorted(adapter.updates.items()):
        _check_low_rank(target, update)
        alphas[target], parts = _parts(update, has_bias=has_bias)
        tensors |= {_name(target, part): tensor for part, tensor in parts.items()}
    tensors |= {_name(name): each.tensor for name, each in adapter.replaced.items()}
    file = _file(tensors, where=adapter.name or "the adapter")
    return AdapterSource(
        updates=tuple(
            _update(file, target, alpha, adapter.updates[target])
            for target, alpha in alphas.items()
        ),
        tensors=file,
        base_name=adapter.base_name,
        task_type=adapter.task_type,
        replacements=tuple(
            Replacement(name, each.role, file.info(_name(name)), each.rows)
            for name, each in sorted(adapter.replaced.items())
        ),
        alora_tokens=adapter.alora_tokens,
        ties_weights=adapter.ties_weights,
    )


def _name(owner: str, part: str = "") -> str:
    return f"update {owner}: {part}" if part else f"replaced {owner}"


def _update(file: TensorFile, target: str, alpha: float, update: Update) -> UpdateSource:
    held = {
        part: file.info(_name(target, part)) if has else None
        for part, has in (
            ("magnitude", update.magnitude is not None),
            ("bias", _name(target, "bias") in file.header.tensors),
        )
    }
    a, b = (file.info(_name(target, part)) for part in "ab")
    return UpdateSource(
        target=target,
        rank=update.rank,
        alpha=alpha,
        rule=_RULE,
        a=a,
        b=b,
        layer=update.layer,
        **held,
    )


def _check_low_rank(target: str, update: Update) -> None:
    terms = {"p (rows)": update.p, "q (columns)": update.q, "the bias": update.bias_scale}
    held = [name for name, term in terms.items() if term is not None]
    if held:
        raise FormatError(
            f"the update scales the base by {', '.join(held)}, which a LoRA file cannot "
            "say",
            where=target,
            hint="merge the adapter into its base instead",
        )
    if not update.rank:
        raise FormatError("the update has no factors", where=target)


def _parts(update: Update, *, has_bias: bool) -> tuple[float, dict[str, Tensor]]:
    """Return alpha, and the tensors of an update in the shapes of its file."""
    alpha, a, b = _with_one_alpha(update)
    parts = {"a": a, "b": b}
    if update.magnitude is not None:
        parts["magnitude"] = _narrowed(update.magnitude, a.dtype)
    if has_bias and update.layer in ("linear", "conv"):
        parts["bias"] = _bias(update, scaling(alpha, update.rank, _RULE), a.dtype)
    if update.layer == "experts":
        parts["a"] = a.flatten(0, 1)
        parts["b"] = b.permute(1, 2, 0).flatten(1)
    elif update.layer == "conv":
        axes = (1,) * len(update.kernel)
        parts["a"] = a.reshape(update.rank, -1, *update.kernel)
        parts["b"] = _by_groups(b, update.groups).reshape(b.shape[0], -1, *axes)
    return alpha, parts


def _by_groups(b: Float[Tensor, "out rank"], groups: int) -> Float[Tensor, "out width"]:
    """Return the blocks of a block-diagonal `b`, one below the other."""
    rows = b.chunk(groups)
    return torch.cat([block.chunk(groups, dim=1)[at] for at, block in enumerate(rows)])


def _with_one_alpha(update: Update) -> tuple[float, Tensor, Tensor]:
    """Return alpha, a and b with `alpha / rank * b @ a` equal to the update."""
    # The absolute value: a sign goes into b without rounding, and tools that expect a
    # positive alpha stay content. Of two equally common ones the larger, so that ratios
    # stay below one and the order of rows has no say.
    counts = Counter(update.scaling.abs().tolist())
    common = max(counts, key=lambda value: (counts[value], value))
    ratio = update.scaling / common if common else torch.ones_like(update.scaling)
    if not common and update.bias is not None:
        common, ratio = 1.0, torch.zeros_like(ratio)  # what the bias is divided by
    alpha = _alpha(common, update.rank)
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


def _bias(update: Update, by: float, dtype: torch.dtype) -> Tensor:
    """Return what times the scaling is the bias."""
    if update.bias is None:
        return torch.zeros(update.shape[0], dtype=dtype)
    quotient = update.bias / by
    for narrow in _dtypes(dtype):
        if torch.equal(quotient.to(narrow).double() * by, update.bias):
            return quotient.to(narrow)
    return quotient.to(torch.promote_types(dtype, torch.float32))


def _narrowed(vector: Float64[Tensor, " n"], dtype: torch.dtype) -> Float[Tensor, " n"]:
    """Return the vector in a dtype that holds it, that of the factors if it does."""
    for narrow in _dtypes(dtype):
        if torch.equal(vector.to(narrow).double(), vector):
            return vector.to(narrow)
    return vector


def _dtypes(first: torch.dtype) -> Iterable[torch.dtype]:
    return first, torch.float32, torch.float64


def _file(tensors: dict[str, Tensor], *, where: str) -> TensorFile:
    specs = [
        (name, NAMES[tensor.dtype], tuple(tensor.shape))
        for name, tensor in sorted(tensors.items())
    ]
    data = b"".join(chunks_of(specs, lambda name: [to_bytes(tensors[name])]))
    return TensorFile.from_bytes(data, where=where)
