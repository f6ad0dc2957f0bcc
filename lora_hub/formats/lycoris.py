"""What the tensors of one module mean, in the methods of sd-scripts and LyCORIS.

LoCon is LoRA on convolutions too, LoHa the product of two low-rank matrices number by
number, LoKr a Kronecker product. Each becomes one pair of factors; those of LoHa, LoKr and
of a convolution in three factors are products of two numbers, exact in float64
(`products.py`). Whatever has no low rank is refused by name.

LyCORIS has folded rsLoRA into the alphas that it stores. A magnitude of DoRA is read where
it belongs to the outputs; the other kind, of the inputs, is another method.

Source: KohakuBlueleaf/LyCORIS, `modules/locon.py`, `loha.py`, `lokr.py` (`get_weight`),
`functional/general.py:rebuild_tucker`, `modules/locon.py:apply_weight_decompose`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any

from lora_hub.errors import FormatError
from lora_hub.formats import factors, layers, products
from lora_hub.formats.factors import Factors
from lora_hub.formats.matrices import Matrix
from lora_hub.formats.products import check_size
from lora_hub.manifest.document import Layer
from lora_hub.tensors.arrays import FLOATS

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Wide = NDArray[np.float64]

# Two numbers of these have a product that is a float64.
_EXACT = frozenset({"BF16", "F16", "F32"})

ALPHA = "alpha"
MAGNITUDE = "dora_scale"

# What stands behind the module's name for kinds that are not read → what it is.
_OTHERS = {
    "a1.weight": "GLoRA: the weight is multiplied too",
    "bias_": "a sparse bias (LyCORIS)",
    "diff_b": "a change of a bias (LyCORIS full)",
    "diff": "the change of a whole weight (LyCORIS full), and no low rank holds it",
    "hada_t": "LoHa with Tucker decomposition, whose factors are sums and not exact",
    "lokr_t2": "LoKr with Tucker decomposition, whose factors are sums and not exact",
    "oft_": "OFT: the weight is multiplied by a rotation, which is no sum of low rank",
    "boft_": "BOFT: the weight is multiplied by rotations, which is no sum of low rank",
    "on_input": "IA3 of LyCORIS, which keeps l - 1: l is not exact",
    "scalar": "a factor on a whole update (LyCORIS use_scalar)",
    "w_norm": "the weight of a norm",
    "b_norm": "the bias of a norm",
}


@dataclass(frozen=True, slots=True)
class Module:
    """The tensors of one module, by what stands behind its name.

    Attributes:
        target: its path.
        shape: of the base's weight; None where it is not known.
        tensors: without the alpha.
        alpha: None where there is none, or it says the rank.
    """

    target: str
    shape: tuple[int, ...] | None
    tensors: Mapping[str, Matrix]
    alpha: float | None
    where: str

    def values(self, name: str) -> Any:
        """Return the numbers of a tensor.

        Raises:
            FormatError: their products would not be exact.
        """
        whole = self.tensors[name]
        if whole.dtype not in _EXACT:
            raise FormatError(
                f"{self.target}: {name} is {whole.dtype}, and products of such numbers are "
                "not exact",
                where=self.where,
            )
        return whole.values()


def update_of(module: Module) -> Factors:
    """Return the module's update.

    Raises:
        FormatError: the tensors are of no method, or of one that is not read; shapes
            disagree.
    """
    names = module.tensors.keys() - {MAGNITUDE}
    for needed, make in _METHODS.items():
        if needed == names:
            try:
                part = make(module)
            except (ValueError, IndexError) as error:  # shapes that do not multiply
                shapes = {name: list(module.tensors[name].shape) for name in sorted(names)}
                raise FormatError(
                    f"{module.target}: the shapes do not fit together: {shapes}",
                    where=module.where,
                ) from error
            return _checked(part, module)
    raise FormatError(
        f"{module.target} has {' and '.join(sorted(names)) or MAGNITUDE} and not the other "
        "factor",
        where=module.where,
        hint="all factors are needed; the file is incomplete",
    )


def describe(said: str, rest: str) -> str:
    """Return what a tensor is that is not read, by what stands behind its module."""
    for start, what in _OTHERS.items():
        if rest.startswith(start):
            return f"{said} is {what}; not read"
    return f"{said} is no low-rank factor of sd-scripts"


# ── methods ──────────────────────────────────────────────────────────────────────────


def _lora(module: Module) -> Factors:
    a, b = module.tensors["lora_down.weight"], module.tensors["lora_up.weight"]
    if module.shape and a.shape[2:] != module.shape[2:]:
        # A kernel of size 1 is a matrix: trainers keep it in either shape.
        ones = (1,) * (len(module.shape) - 2)
        if set(a.shape[2:] + b.shape[2:]) <= {1}:
            a, b = a.shaped((*a.shape[:2], *ones)), b.shaped((*b.shape[:2], *ones))
    alpha = module.alpha or float(a.shape[0])
    return Factors(
        module.target,
        alpha,
        "alpha/r",
        a,
        b,
        layer="conv" if len(a.shape) > 2 else "linear",
    )


def _tucker(module: Module) -> Factors:
    # Δ[o, i, k] = Σ up[o, p] · mid[p, q, k] · down[q, i]: a row of a for each (p, q).
    down, mid, up = (module.values(f"lora_{name}.weight") for name in ("down", "mid", "up"))
    rank, inputs = down.shape[:2]
    kernel = mid.shape[2:]
    if mid.shape[:2] != (up.shape[1], rank) or {*down.shape[2:], *up.shape[2:]} - {1}:
        raise ValueError
    check_size([(up.shape[0], inputs * prod(kernel), mid.shape[0] * rank)], module.where)
    wide = mid.reshape(*mid.shape[:2], 1, -1).astype("f8")
    a = wide * down.reshape(1, rank, inputs, 1).astype("f8")
    b = up.reshape(-1, mid.shape[0]).astype("f8").repeat(rank, axis=1)
    scaling = (module.alpha or float(rank)) / rank
    return _product(module, a.reshape(-1, inputs * prod(kernel)), b, scaling, kernel)


def _loha(module: Module) -> Factors:
    b1, a1 = _factors(module, "hada_w1")
    b2, a2 = _factors(module, "hada_w2")
    if b1.shape != b2.shape or a1.shape != a2.shape:
        raise ValueError
    rank, columns = a1.shape
    check_size([(b1.shape[0], columns, rank * rank)], module.where)
    a, b = products.khatri_rao(a1, b1, a2, b2)
    return _product(module, a, b, (module.alpha or float(rank)) / rank)


def _lokr(module: Module) -> Factors:
    ranks = set()
    wholes: list[Any] = []
    for name in ("lokr_w1", "lokr_w2"):
        if name in module.tensors:
            whole = module.values(name)
            wholes.append(whole.reshape(whole.shape[0], -1))
        else:
            pair = _factors(module, name)
            ranks.add(pair[0].shape[1])
            wholes.append(pair)
    out, columns, rank = (prod(sizes) for sizes in zip(*map(_sizes, wholes), strict=True))
    if rank >= min(out, columns):
        raise FormatError(
            f"{module.target}: LoKr of rank {rank}, as high as that of the weight: no low "
            "rank holds it",
            where=module.where,
        )
    check_size([(out, columns, rank)], module.where)
    a, b = products.kronecker_factors(*wholes)
    if len(ranks) > 1:
        raise FormatError(
            f"{module.target}: LoKr with the ranks {sorted(ranks)}, expected one",
            where=module.where,
        )
    # Two whole matrices have no rank, and LyCORIS takes the scaling 1 whatever alpha says.
    scaling = (module.alpha or float(min(ranks))) / min(ranks) if ranks else 1.0
    if "lokr_w2" not in module.tensors:
        return _product(module, a, b, scaling)
    kernel = module.tensors["lokr_w2"].shape[2:]
    if not kernel and module.shape and prod(module.shape[2:]) > 1:
        raise ValueError
    return _product(module, a, b, scaling, kernel)


def _sizes(whole: Any) -> tuple[int, int, int]:
    """Return rows, columns and rank of a matrix, or of the product of two factors."""
    if isinstance(whole, tuple):
        b, a = whole
        return b.shape[0], a.shape[1], a.shape[0]
    rows, columns = whole.shape
    return rows, columns, min(rows, columns)


def _factors(module: Module, name: str) -> tuple[Any, Any]:
    """Return b (out, rank) and a (rank, in), which LyCORIS calls …_a and …_b."""
    b, a = module.values(f"{name}_a"), module.values(f"{name}_b")
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
        raise ValueError
    return b, a


_LOKR = {("lokr_w1",), ("lokr_w1_a", "lokr_w1_b")}
_LOKR_2 = {("lokr_w2",), ("lokr_w2_a", "lokr_w2_b")}

# the tensors → what makes an update of them
_METHODS: Mapping[frozenset[str], Callable[[Module], Factors]] = {
    frozenset({"lora_down.weight", "lora_up.weight"}): _lora,
    frozenset({"lora_down.weight", "lora_mid.weight", "lora_up.weight"}): _tucker,
    frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}): _loha,
    **{frozenset({*one, *two}): _lokr for one in _LOKR for two in _LOKR_2},
}
# What can stand behind a module's name, besides its alpha.
KNOWN = frozenset().union(*_METHODS) | {MAGNITUDE}


def _product(
    module: Module,
    a: "Wide",
    b: "Wide",
    scaling: float,
    kernel: tuple[int, ...] | None = None,
) -> Factors:
    """Return factors a (rank, in · kernel) and b (out, rank) in the base's shape."""
    if not kernel:
        kernel = module.shape[2:] if module.shape else ()
    columns = a.shape[1]
    inputs, rest = divmod(columns, prod(kernel))
    if rest:
        raise FormatError(
            f"{module.target}: {columns} columns are no kernel of {list(kernel)}",
            where=module.where,
        )
    rank = a.shape[0]
    whole_a, whole_b = products.stored(
        a.reshape(rank, inputs, *kernel), b.reshape(-1, rank, *(1 for _ in kernel))
    )
    layer: Layer = "conv" if kernel else "linear"
    return factors.of_scaling(module.target, scaling, whole_a, whole_b, layer)


# ── checks ───────────────────────────────────────────────────────────────────────────


def _checked(part: Factors, module: Module) -> Factors:
    if layers.layer_of(part.target, part.a) == "embedding":
        raise FormatError(
            f"{part.target} is an embedding, of which sd-scripts knows no update",
            where=module.where,
        )
    magnitude = module.tensors.get(MAGNITUDE)
    if magnitude:
        outputs = part.b.shape[0]
        shape = list(magnitude.shape)
        if shape[:1] != [outputs] or magnitude.dtype not in FLOATS:
            raise FormatError(
                f"{part.target}: {MAGNITUDE} is {shape} and there are {outputs} outputs: a "
                "magnitude of the inputs is another method than DoRA, and not read",
                where=module.where,
            )
        if prod(shape) == outputs:
            magnitude = magnitude.shaped((outputs,))
        part = replace(part, magnitude=magnitude)
    layers.check_factors(part, module.where)
    _check_fit(part, module)
    return part


def _check_fit(part: Factors, module: Module) -> None:
    """Raise `FormatError` where the base's weight has another shape.

    Of a convolution in groups the base tells the channels of one, so those are left out.
    """
    if module.shape is None:
        return
    found = (part.b.shape[0], *part.a.shape[2:])
    if found != (module.shape[0], *module.shape[2:]):
        raise FormatError(
            f"{part.target}: the factors are for {found[0]} outputs and a kernel of "
            f"{list(found[1:])}, the base's weight is {list(module.shape)}",
            where=module.where,
        )
