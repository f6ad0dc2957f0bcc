"""PiSSA, OLoRA, CorDA and LoRA-GA as plain LoRA, by the factors they began with.

These methods begin by taking `s·B₀A₀` out of the base's weight, so that the adapter is
right only on the changed base:

    W + Δ = (W - s·B₀A₀) + s·BA        Δ = s·BA - s·B₀A₀ = s·[B, -B₀] @ [A; A₀]

No number is computed but a sign. What the training program lost when it stored the changed
base in a narrow dtype is in no file and does not come back.

Sources: Meng et al. 2024, arXiv:2404.02948, appendix C; PEFT 0.21.2,
`tuners/lora/model.py:subtract_mutated_init`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_hub.errors import FormatError
from lora_hub.formats import peft
from lora_hub.formats.computed import exact_alpha, in_memory
from lora_hub.formats.files import CONFIG_NAME, open_files
from lora_hub.formats.matrices import Matrix, of_raw, stacked
from lora_hub.formats.peft_config import is_undoable
from lora_hub.formats.source import AdapterSource, Replacement, UpdateSource
from lora_hub.tensors.dtypes import BITS
from lora_hub.tensors.file import TensorFile
from lora_hub.tensors.header import TensorInfo

# A list in a message names so many targets and counts the others.
_NAMED = 3


def subtract(
    source: AdapterSource, config: Mapping[str, Any], initial: Path, *, where: str
) -> AdapterSource:
    """Return the adapter for the base as it was before the training.

    The rank is twice as large, the scaling the same number, and every factor keeps its
    dtype and bits; what else the source holds stays.

    Args:
        source: the trained adapter.
        config: its `adapter_config.json`.
        initial: folder of the adapter as PEFT saved it after the initialisation and before
            the training; its own `init_lora_weights` may be true, as PEFT asks for.
        where: the trained adapter's directory, for messages.

    Raises:
        FormatError: the two are not one adapter at two times, or hold what these methods
            cannot begin with.
        InputError: the folder cannot be read.
    """
    kind = config.get("init_lora_weights")
    if kind not in (None, True) and not is_undoable(config):
        raise FormatError(
            f"init_lora_weights is {kind!r}, which takes nothing out of the base: there is "
            "no use for initial factors",
            where=f"{where}/{CONFIG_NAME}",
            hint="leave out --initial",
        )
    before = _read(config, initial)
    _check_same(source, before, where, str(initial))
    files = {"now": source.tensors, "then": before.tensors}
    old = {update.target: update for update in before.updates}
    tensors: dict[str, Matrix] = {}
    alphas: dict[str, float] = {}
    for update in source.updates:
        alphas[update.target], a, b = _joined(update, old[update.target], files)
        tensors |= {f"{update.target}.a": a, f"{update.target}.b": b}
    tensors |= {
        f"{replacement.name} whole": _matrix(source.tensors, replacement.tensor)
        for replacement in source.replacements
    }
    file = in_memory(tensors, where)
    return replace(
        source,
        tensors=file,
        updates=tuple(
            UpdateSource(
                target=update.target,
                rank=file.info(f"{update.target}.a").shape[0],
                alpha=alphas[update.target],
                rule="alpha/r",
                a=file.info(f"{update.target}.a"),
                b=file.info(f"{update.target}.b"),
            )
            for update in source.updates
        ),
        replacements=tuple(
            Replacement(each.name, each.role, file.info(f"{each.name} whole"), each.rows)
            for each in source.replacements
        ),
    )


def _read(config: Mapping[str, Any], initial: Path) -> AdapterSource:
    """Return the adapter of before the training."""
    files = open_files(initial)
    found = files.config()
    for name in (CONFIG_NAME, peft.WEIGHTS_NAME):
        if name not in files.names:
            raise FormatError(
                f"there is no {name}: the initial factors are a folder that PEFT saved",
                where=files.where,
                hint="save_pretrained before the training wrote it",
            )
    start = (found or {}).get("init_lora_weights")
    trained = config.get("init_lora_weights")
    # PEFT has its users write true into either config, so that loading starts nothing.
    if start not in (None, True) and trained not in (None, True, start):
        raise FormatError(
            f"init_lora_weights is {start!r}, that of the trained adapter {trained!r}",
            where=f"{files.where}/{CONFIG_NAME}",
            hint="name the folder that was saved when this training began",
        )
    tensors = TensorFile.from_bytes(
        files.read(peft.WEIGHTS_NAME), where=f"{files.where}/{peft.WEIGHTS_NAME}"
    )
    # How the factors came to be is no matter here: they are what is taken out.
    return peft.read_peft(
        {**(found or {}), "init_lora_weights": True}, tensors, where=files.where
    )


def _check_same(
    source: AdapterSource, before: AdapterSource, where: str, initial: str
) -> None:
    """Raise `FormatError` unless both have the same factors but for their numbers."""
    targets = {update.target for update in source.updates}
    others = {update.target for update in before.updates}
    if targets != others:
        raise FormatError(
            f"the initial factors are of other targets: {_some(targets ^ others)}",
            where=initial,
        )
    names = (source.base_name, before.base_name)
    if None not in names and names[0] != names[1]:
        raise FormatError(
            f"the initial factors were made on {names[1]!r}, the adapter's on {names[0]!r}",
            where=initial,
        )
    then = {update.target: update for update in before.updates}
    is_trained = False
    for now in source.updates:
        old = then[now.target]
        for update, place in ((now, where), (old, initial)):
            if update.layer != "linear" or update.magnitude or update.bias:
                raise FormatError(
                    f"{update.target}: only plain factors of a linear layer begin so, this "
                    "has a magnitude, a bias or another layer",
                    where=place,
                )
        _check_pair(now, old, initial)
        files = (source.tensors, before.tensors)
        for left, right in ((now.a, old.a), (now.b, old.b)):
            data = bytes(files[1].read(right.name))
            is_trained |= files[0].read(left.name) != data
            if not any(data):
                raise FormatError(
                    f"{now.target}: an initial factor is zero, as LoRA begins: nothing was "
                    "taken out of the base",
                    where=initial,
                    hint="name the folder that was saved when this training began",
                )
    if not is_trained:
        raise FormatError(
            "the initial factors are those of the adapter itself: nothing would be left",
            where=initial,
            hint="name the folder that was saved before the training",
        )


def _check_pair(now: UpdateSource, old: UpdateSource, initial: str) -> None:
    told = {
        "shapes": (_shapes(now), _shapes(old)),
        "dtypes": ((now.a.dtype, now.b.dtype), (old.a.dtype, old.b.dtype)),
        "scaling": (now.scaling, old.scaling),
    }
    for what, (trained, first) in told.items():
        if trained != first:
            raise FormatError(
                f"{now.target}: the {what} of the initial factors is {first}, of the "
                f"trained ones {trained}",
                where=initial,
            )


def _joined(
    now: UpdateSource, old: UpdateSource, files: Mapping[str, TensorFile]
) -> tuple[float, Matrix, Matrix]:
    """Return alpha, [A; A₀] and [B, -B₀], longer by zeros where alpha needs that."""
    a = stacked([_matrix(files["now"], now.a), _matrix(files["then"], old.a)])
    minus = _negated(_matrix(files["then"], old.b))
    b = stacked([_matrix(files["now"], now.b), minus], axis=1)
    alpha, rank = exact_alpha(now.scaling, a.shape[0])
    if more := rank - a.shape[0]:
        a = stacked([a, _zeros(a.dtype, (more, a.shape[1]))])
        b = stacked([b, _zeros(b.dtype, (b.shape[0], more))], axis=1)
    return alpha, a, b


def _negated(matrix: Matrix) -> Matrix:
    # The highest bit is the sign in every floating-point dtype.
    raw = matrix.raw()
    return of_raw(matrix.dtype, raw ^ raw.dtype.type(1 << (BITS[matrix.dtype] - 1)))


def _zeros(dtype: str, shape: tuple[int, int]) -> Matrix:
    return Matrix(dtype, shape, bytes(shape[0] * shape[1] * BITS[dtype] // 8))


def _matrix(file: TensorFile, tensor: TensorInfo) -> Matrix:
    return Matrix(tensor.dtype, tensor.shape, file.read(tensor.name))


def _shapes(update: UpdateSource) -> str:
    return f"{list(update.a.shape)} and {list(update.b.shape)}"


def _some(targets: Iterable[str]) -> str:
    names = sorted(targets)
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
