"""`AdapterSource` → `Adapter`: the tensors of an adapter file as torch tensors.

The bytes are those the source holds, which are the ones that were hashed; they are copied
once, all together, so that the tensors have memory of their own. Names, pairs,
dtypes, shapes and scalings were settled by the reader in `formats/`. What a file lays out
in another way than (out, in) is turned here, without touching a number.
"""

import functools
from collections.abc import Callable

import torch
from jaxtyping import Float, Float64, Shaped
from torch import Tensor

from lora_hub.adapter.adapter import Adapter, Replaced
from lora_hub.adapter.tensor_bytes import all_at_once, one_by_one
from lora_hub.adapter.update import Update
from lora_hub.errors import FormatError
from lora_hub.formats.source import AdapterSource, Replacement, ScaleSource, UpdateSource
from lora_hub.manifest.document import Base
from lora_hub.tensors.file import TensorFile
from lora_hub.tensors.header import TensorInfo

# A tensor of the file → its numbers.
Read = Callable[[TensorInfo], Shaped[Tensor, "..."]]


def load(
    source: AdapterSource,
    *,
    name: str | None = None,
    version: str | None = None,
    digest: str | None = None,
    base: Base | None = None,
) -> Adapter:
    """Return the adapter in memory, its factors in the dtypes of the file.

    Raises:
        FormatError: as `load_update`; or one target has factors and scales, or two scales.
    """
    read = all_at_once(source.tensors)
    # Most targets have one rank and one scaling; one tensor serves them all.
    scaling = functools.cache(_rows)
    updates: dict[str, Update] = {}
    for update in source.updates:
        updates[update.target] = _update(read, update, scaling)
    for scale in source.scales:
        if scale.target in updates:
            raise FormatError(
                "the adapter changes the target in two ways that were not trained together",
                where=scale.target,
                hint="give it as two adapters",
            )
        updates[scale.target] = _scale(read, scale)
    return Adapter(
        updates=dict(sorted(updates.items())),
        name=name,
        version=version,
        digest=digest,
        base=base,
        base_name=source.base_name,
        task_type=source.task_type,
        replaced={
            replacement.name: _replaced(read, replacement)
            for replacement in sorted(source.replacements, key=lambda each: each.name)
        },
        alora_tokens=source.alora_tokens,
        ties_weights=source.ties_weights,
    )


def load_update(file: TensorFile, update: UpdateSource) -> Update:
    """Return one update, for callers that hold one target in memory at a time.

    Factors keep the dtype of the file; magnitude and bias are float64, the bias times the
    scaling. A convolution's factors are flat, and with groups `b` is block-diagonal: the
    outputs of a group see that group's share of the rank. Experts' factors have the experts
    in front.

    Raises:
        FormatError: a convolution's `b` does not split by groups; or it has groups and is
            DoRA, for whose norm a grouped weight has no place.
    """
    return _update(one_by_one(file), update, _rows)


def load_scale(file: TensorFile, scale: ScaleSource) -> Update:
    """Return factors on outputs or inputs as an update of rank 0.

    The file does not say how wide the other side is, so `a` is (0, in) and `b` (0, 0), or
    `a` is (0, 0) and `b` (out, 0). A vector of three axes or more is a convolution's, and
    its columns are input channels (`Update.kernel` stays empty).
    """
    return _scale(one_by_one(file), scale)


def _update(
    read: Read,
    update: UpdateSource,
    scaling: Callable[[int, float], Float64[Tensor, " rank"]],
) -> Update:
    a, b = read(update.a), read(update.b)
    if update.layer == "conv":
        a, b = a.flatten(start_dim=1), _ungrouped(b.flatten(start_dim=1), update)
    elif update.layer == "experts":
        a = a.reshape(update.experts, update.rank, a.shape[-1])
        b = b.reshape(b.shape[0], update.rank, update.experts).permute(2, 0, 1).contiguous()
    return Update(
        a=a,
        b=b,
        scaling=scaling(update.rank, update.scaling),
        bias=None if update.bias is None else _vector(read, update.bias) * update.scaling,
        layer=update.layer,
        kernel=update.a.shape[2:],
        magnitude=None if update.magnitude is None else _vector(read, update.magnitude),
        groups=update.rank // update.b.shape[1] if update.layer == "conv" else 1,
    )


def _scale(read: Read, scale: ScaleSource) -> Update:
    change = _vector(read, scale.vector) - 1
    rows = change if scale.axis == "rows" else None
    columns = change if scale.axis == "columns" else None
    return Update(
        a=torch.zeros(0, 0 if columns is None else len(columns)),
        b=torch.zeros(0 if rows is None else len(rows), 0),
        scaling=torch.zeros(0, dtype=torch.float64),
        p=rows,
        q=columns,
        bias_scale=rows,
        layer="conv" if len(scale.vector.shape) > 2 else "linear",
    )


def _replaced(read: Read, replacement: Replacement) -> Replaced:
    """Return the new numbers of a tensor of the base, in the dtype of the file."""
    return Replaced(
        tensor=read(replacement.tensor), role=replacement.role, rows=replacement.rows
    )


def _rows(rank: int, scaling: float) -> Float64[Tensor, " rank"]:
    return torch.full((rank,), scaling, dtype=torch.float64)


def _vector(read: Read, info: TensorInfo) -> Float64[Tensor, " n"]:
    return read(info).reshape(-1).double()


def _ungrouped(
    b: Float[Tensor, "out width"], update: UpdateSource
) -> Float[Tensor, "out rank"]:
    out, width = b.shape
    groups, rest = divmod(update.rank, width) if width else (0, 1)
    if rest or out % max(groups, 1):
        raise FormatError(
            f"factor b has {width} inputs and {out} outputs, which are no equal groups of "
            f"rank {update.rank}",
            where=update.target,
        )
    if groups == 1:
        return b
    if update.magnitude is not None:
        raise FormatError(
            f"DoRA on a convolution with {groups} groups: its factors see all channels, "
            "its weight those of one group, so the weight has no norm with the update",
            where=update.target,
            hint="train it without DoRA, or leave this layer out",
        )
    whole = b.new_zeros(out, update.rank)
    for group, block in enumerate(b.chunk(groups)):
        rows = group * len(block)
        whole[rows : rows + len(block), group * width : (group + 1) * width] = block
    return whole
