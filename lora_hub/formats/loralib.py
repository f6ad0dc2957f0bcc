"""microsoft/LoRA's loralib: factors beside the modules' own names, both ways.

`<module>.lora_A` is (rank, in), `<module>.lora_B` (out, rank); of an embedding
(rank, num_embeddings) and (embedding_dim, rank). loralib itself saves pickles, which are
never read; here the same names lie in a safetensors file. The scaling lora_alpha/rank is
an argument of its layers and in no file, so the caller must say it.

A `MergedLinear` holds q, k and v in one weight, and factors of those that are enabled:
`lora_A` (groups · rank, in), `lora_B` (out of the groups, rank). They become one pair of
factors whose `b` has a block for each group and zeros elsewhere. Which groups are enabled
is in no file either; where all of them are, the base's shape tells.

Its convolutions keep factors of two axes under the same names, into which the kernel is
folded; the base's shape tells how.

Limit: embeddings are told by what the module is called.

Source: microsoft/LoRA 2eb74c2, `loralib/layers.py`.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from lora_hub.errors import FormatError
from lora_hub.formats import base_names, factors, layers, losses
from lora_hub.formats.base_names import Shapes
from lora_hub.formats.dialect import Given, Glance, ReadOptions, Written
from lora_hub.formats.factors import Factors
from lora_hub.formats.matrices import Matrix, block_diagonal, of_raw
from lora_hub.formats.source import AdapterSource
from lora_hub.scaling import is_alpha
from lora_hub.tensors.file import TensorFile

if TYPE_CHECKING:
    from lora_hub.formats.matrices import Raw

WEIGHTS_NAME = "lora.safetensors"
SAYS = frozenset({"alpha64", "components", "embeddings", "float64", "language", "ranks"})

_FACTOR = re.compile(r"(.+)\.lora_([AB])")
_CONVOLUTION = re.compile(r"conv(2d|3d|_.*|\d*)")  # conv, conv1, conv_in; not conv1d_proj


def claim_weights(glance: Glance) -> str | None:
    if glance.header is None or not glance.header.tensors:
        return None
    is_ours = all(
        # AdapterHub's are `<module>.loras.<adapter>.lora_A`: its adapter is no module.
        _FACTOR.fullmatch(name) and ".loras." not in name
        for name in glance.header.tensors
    )
    return "every tensor is named ….lora_A or ….lora_B" if is_ours else None


def read(given: Given, options: ReadOptions) -> AdapterSource:
    """Return the adapter under the alpha that the caller says.

    Raises:
        FormatError: no alpha was said, or a tensor is of a kind that is not read yet.
    """
    where = given.weights_where
    tensors = TensorFile.from_bytes(given.weights, where=where)
    found = []
    for name, tensor in tensors.header.tensors.items():
        match = _FACTOR.fullmatch(name)
        if match is None:
            what = "a bias" if name.endswith(".bias") else "no low-rank factor"
            raise FormatError(
                f"the tensor {name!r} is {what}, which is not read yet", where=where
            )
        found.append((match[1], match[2].lower(), tensor))
    pairs = factors.pair_up(found, where)
    shapes = base_names.modules_of(options.base).get("", {}) if options.base else {}
    alpha = _alpha(options, where)
    parts = []
    for target, (a, b) in pairs.items():
        whole_a, whole_b = factors.matrix(tensors, a), factors.matrix(tensors, b)
        shape = shapes.get(target, ())
        if len(shape) > 2 or _CONVOLUTION.fullmatch(target.rpartition(".")[2]):
            part = _convolution(target, whole_a, whole_b, alpha, shape, where)
        elif len(a.shape) == len(b.shape) == 2 and _groups(a.shape[0], b.shape[1]):
            part = _merged(target, whole_a, whole_b, alpha, options, shapes, where)
        else:
            layer = layers.layer_of(target, whole_a)
            part = Factors(target, alpha, "alpha/r", whole_a, whole_b, layer=layer)
        layers.check_factors(part, where)
        parts.append(part)
    return factors.to_source(parts, where=where)


def write(source: AdapterSource, base: Path | None = None) -> Written:
    """Return the file, and in the notes the alpha that it cannot hold.

    Raises:
        LossyConversion: there is no one alpha for all targets, or the adapter holds what
            is no low-rank update of a linear layer or an embedding.
    """
    parts = factors.of_source(source)
    alphas = {part.target: factors.plain_alpha(part) for part in parts}
    found = []
    inexact = [target for target, alpha in alphas.items() if alpha is None]
    if inexact:
        found.append(f"no alpha over the rank is the scaling of {factors.some(inexact)}")
    several = sorted({alpha for alpha in alphas.values() if alpha is not None})
    if len(several) > 1:
        found.append(f"one alpha for all targets, these have {several}")
    factors.refuse(losses.beyond(source, SAYS) + found, "loralib")
    tensors = {
        f"{part.target}.lora_{which}": whole
        for part in parts
        for which, whole in (("A", part.a), ("B", part.b))
    }
    note = f"the file cannot hold its alpha: read it with lora_alpha={several[0]!r}"
    return Written({WEIGHTS_NAME: factors.safetensors(tensors)}, (note,))


def _convolution(
    target: str,
    a: Matrix,
    b: Matrix,
    alpha: float,
    shape: tuple[int, ...],
    where: str,
) -> Factors:
    """Return the update of a convolution, of more ranks than loralib's.

    Its delta is `(lora_B @ lora_A).view(weight.shape)`: the rows of `lora_B` count outputs
    and within them rows of the kernel, each of which has ranks of its own here.

    Args:
        target: its path.
        a: (rank * k, in * k).
        b: (out * k, rank * k).
        alpha: what is divided by loralib's rank.
        shape: of the base's weight, (out, in, k, k); () where it is not known.
        where: the file, for messages.
    """
    if not shape:
        raise FormatError(
            f"{target} is a convolution by its name, whose kernel loralib folds into the "
            "factors' axes",
            where=where,
            hint="give the folder of the base: its shapes tell the kernel",
        )
    out, inputs, *kernel = shape
    size = kernel[0]
    rows, rest = divmod(a.shape[0] if a.shape else 0, size)
    is_right = (a.shape, b.shape) == (
        (rows * size, inputs * size),
        (out * size, rows * size),
    )
    if kernel != [size, size] or rest or not rows or not is_right:
        raise FormatError(
            f"{target}: the factors are {list(a.shape)} and {list(b.shape)}, the base's "
            f"weight {list(shape)}; expected a Conv2d of loralib without groups",
            where=where,
        )
    rank = rows * size * size
    whole_a = block_diagonal([a] * size).shaped((rank, inputs, size, size))
    whole_b = b.shaped((out, rank, 1, 1))
    return factors.of_scaling(target, alpha / rows, whole_a, whole_b, "conv")


def _merged(
    target: str,
    a: Matrix,
    b: Matrix,
    alpha: float,
    options: ReadOptions,
    shapes: Shapes,
    where: str,
) -> Factors:
    """Return the update of a whole MergedLinear, of which some groups are enabled."""
    groups, rank = a.shape[0] // b.shape[1], b.shape[1]
    enabled = _enabled(target, a, b, options, shapes, where)
    if sum(enabled) != groups or b.shape[0] % groups:
        raise FormatError(
            f"{target}: lora_A has {a.shape[0]} rows and lora_B {list(b.shape)}, of "
            f"{groups} groups; enable_lora names {sum(enabled)} of {len(enabled)}",
            where=where,
        )
    size = b.shape[0] // groups
    blocks = block_diagonal([b.rows(n * size, (n + 1) * size) for n in range(groups)]).raw()
    whole = _placed(blocks, enabled, size)
    # The rank is that of all groups, and the scaling that of one.
    return factors.of_scaling(target, alpha / rank, a, of_raw(b.dtype, whole))


def _placed(blocks: "Raw", enabled: tuple[bool, ...], size: int) -> "Raw":
    """Return the rows of each enabled group where it stands, zeros for the others."""
    import numpy as np

    whole = np.zeros((len(enabled) * size, blocks.shape[1]), blocks.dtype)
    at = [group for group, is_enabled in enumerate(enabled) if is_enabled]
    for number, group in enumerate(at):
        rows = blocks[number * size : (number + 1) * size]
        whole[group * size : (group + 1) * size] = rows
    return whole


def _enabled(
    target: str,
    a: Matrix,
    b: Matrix,
    options: ReadOptions,
    shapes: Shapes,
    where: str,
) -> tuple[bool, ...]:
    if options.enable_lora is not None:
        return options.enable_lora
    shape = shapes.get(target, ())
    groups = a.shape[0] // b.shape[1]
    # GPT-2 stores the transpose. A layer that is not as wide as so many together is none
    # of them in one: its factors have unlike ranks.
    is_of_base = shape in {(b.shape[0], a.shape[1]), (a.shape[1], b.shape[0])}
    if is_of_base and b.shape[0] == groups * a.shape[1]:
        return (True,) * groups
    raise FormatError(
        f"{target}: lora_A has {a.shape[0]} rows and lora_B {b.shape[1]} columns, as of a "
        "MergedLinear (q, k and v in one layer); which of them are adapted (enable_lora) "
        "is in no file",
        where=where,
        hint="where all are, give the folder of the base with --base: its shapes may tell; "
        "else say which with --enable-lora",
    )


def _groups(rows: int, columns: int) -> bool:
    return columns > 0 and rows > columns and rows % columns == 0


def _alpha(options: ReadOptions, where: str) -> float:
    if options.alpha is None:
        raise FormatError(
            "loralib keeps no scaling in the file",
            where=where,
            hint="say the lora_alpha of the layers with --alpha",
        )
    if not is_alpha(options.alpha):
        raise FormatError(f"alpha is {options.alpha}, expected a finite number below 1e150")
    return options.alpha
