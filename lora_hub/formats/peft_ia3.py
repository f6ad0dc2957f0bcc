"""(IA)³ of PEFT: one vector a module that scales its outputs, or its inputs.

Nothing is computed: the vectors stay where they are in the file. A feed-forward module's
vector scales the inputs, another's the outputs, the layer's bias too.

Sources: Liu et al. 2022, arXiv:2205.05638; PEFT 0.21.2, `tuners/ia3/layer.py`.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from lora_hub.errors import FormatError
from lora_hub.formats.patterns import Pattern
from lora_hub.formats.peft_methods import Held, Method, is_names, labels, open_method
from lora_hub.formats.source import AdapterSource, ScaleSource
from lora_hub.tensors.arrays import FLOATS
from lora_hub.tensors.file import TensorFile
from lora_hub.tensors.header import TensorInfo

_NAME = "ia3_l"


def read_ia3(
    config: Mapping[str, Any], tensors: TensorFile, where: str, base: Path | None = None
) -> AdapterSource:
    """Return the adapter in PEFT's files; see `peft_types.Reader`.

    Raises:
        FormatError: config and tensors disagree, or hold something else.
    """
    method = open_method(
        config,
        tensors,
        where,
        names={_NAME},
        read={"feedforward_modules"},
        inert={"init_ia3_weights"},
    )
    is_feedforward = _matcher(config.get("feedforward_modules"), method)
    scales = []
    for held in method.held:
        vector = held.tensors[_NAME]
        said: Literal["rows", "columns"] | None = None
        if is_feedforward is not None:
            said = "columns" if is_feedforward(held.key) else "rows"
        scales.append(ScaleSource(held.target, _axis(method, held, vector, said), vector))
    return AdapterSource(
        updates=(),
        tensors=tensors,
        scales=tuple(scales),
        replacements=method.saved,
        **labels(config),
    )


def _matcher(chosen: Any, method: Method) -> Callable[[str], bool] | None:
    if not is_names(chosen):
        raise FormatError(
            f"feedforward_modules is {chosen!r}, expected a list of names, or one regular "
            "expression",
            where=method.config_where,
        )
    if chosen is None:
        return None
    if isinstance(chosen, str):
        where = f"{method.config_where}#/feedforward_modules"
        return Pattern(chosen, where=where, budget=method.budget, whole=True).is_match
    # PEFT compares plain endings here, not whole dotted parts.
    return lambda key: key.endswith(tuple(chosen))


def _axis(
    method: Method,
    held: Held,
    vector: TensorInfo,
    said: Literal["rows", "columns"] | None,
) -> Literal["rows", "columns"]:
    """Return what the vector scales: shape (1, in) inputs, (out, 1) outputs.

    A convolution's vector is (1, channels, 1, …) either way, so there the config decides.
    """
    shape = vector.shape
    if vector.dtype not in FLOATS or len(shape) < 2 or max(shape) != math.prod(shape):
        method.refuse(held, f"{_NAME} is {vector.dtype} {list(shape)}, expected a vector")
    if len(shape) > 2:
        if said is None:
            method.refuse(
                held, "feedforward_modules is null: inputs or outputs may be meant"
            )
        return said
    by_shape: Literal["rows", "columns"] = "columns" if shape[0] == 1 else "rows"
    if said is not None and said != by_shape and max(shape) > 1:
        others = {"columns": "inputs", "rows": "outputs"}
        method.refuse(
            held,
            f"{_NAME} is {list(shape)}, which scales {others[by_shape]}; by "
            f"feedforward_modules it scales {others[said]}",
        )
    return said or by_shape
