"""What the readers of PEFT's other methods share: keys of the config, names of tensors.

A method names its own keys and the last parts of its tensors; here they are held against
what the file and the config hold, so that nothing in either goes unread. What a reader
computes becomes an adapter in `computed.py`.

Source: PEFT 0.21.2, `tuners/tuners_utils.py`, `utils/save_and_load.py`, `utils/other.py`.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

from lora_hub.errors import FormatError
from lora_hub.formats.files import CONFIG_NAME
from lora_hub.formats.patterns import Budget
from lora_hub.formats.peft_config import TASK_TYPES
from lora_hub.formats.peft_targets import check_targets, saved_names
from lora_hub.formats.peft_tensors import PREFIX, WEIGHTS_NAME, without_prefix
from lora_hub.formats.source import Replacement
from lora_hub.scaling import is_alpha
from lora_hub.tensors.arrays import FLOATS, floats
from lora_hub.tensors.file import TensorFile
from lora_hub.tensors.header import TensorInfo

if TYPE_CHECKING:
    from lora_hub.formats.products import Array

# Keys of every method whose value does not change what a trained adapter does.
_INERT = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "fan_in_fan_out",  # how the base stores its weight: the change is the same
        "inference_mode",
        "peft_type",
        "peft_version",
        "revision",
        "runtime_config",
    }
)
_READ = frozenset(
    {
        "exclude_modules",
        "layers_pattern",
        "layers_to_transform",
        "modules_to_save",
        "target_modules",
        "task_type",
    }
)


@dataclass(frozen=True, slots=True)
class Held:
    """The tensors of one module, by how their names end.

    Attributes:
        key: the module's path as PEFT's rules see it.
        target: the path in the base.
    """

    key: str
    target: str
    tensors: dict[str, TensorInfo] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Method:
    """One reading of a file, with the config checked.

    Attributes:
        config: the object in `adapter_config.json`.
        where: the directory, for messages.
        held: in order of targets.
        saved: tensors of whole modules.
        budget: what is left for the patterns of the config.
    """

    config: Mapping[str, Any]
    tensors: TensorFile
    where: str
    held: tuple[Held, ...]
    saved: tuple[Replacement, ...]
    budget: Budget

    @property
    def config_where(self) -> str:
        return f"{self.where}/{CONFIG_NAME}"

    @property
    def keys(self) -> list[str]:
        return [held.key for held in self.held]

    def array(self, tensor: TensorInfo) -> "Array":
        """Return the numbers of a tensor, each of them finite and one of float32.

        Raises:
            FormatError: they are not; products of other numbers would be rounded.
        """
        import numpy as np

        where = f"{self.where}/{WEIGHTS_NAME}"
        if tensor.dtype not in FLOATS:
            raise FormatError(
                f"the tensor {tensor.name!r} is of {tensor.dtype}; expected one of "
                f"{', '.join(sorted(FLOATS))}",
                where=where,
            )
        found = floats(self.tensors.read(tensor.name), tensor.dtype, tensor.shape)
        if not np.isfinite(found).all():
            raise FormatError(
                f"the tensor {tensor.name!r} holds a number that is not finite", where=where
            )
        with np.errstate(over="ignore"):
            narrow = found.astype(np.float32)
        if tensor.dtype == "F64" and not np.array_equal(narrow, found):
            raise FormatError(
                f"the tensor {tensor.name!r} holds numbers that are no float32: their "
                "products would be rounded",
                where=where,
                hint="save it in float32 with PEFT, then nothing is rounded here",
            )
        return narrow

    def refuse(self, held: Held, problem: str, hint: str | None = None) -> NoReturn:
        """Raise a `FormatError` about one module."""
        raise FormatError(
            f"{held.target}: {problem}", where=f"{self.where}/{WEIGHTS_NAME}", hint=hint
        )


def open_method(
    config: Mapping[str, Any],
    tensors: TensorFile,
    where: str,
    *,
    names: Collection[str],
    read: Collection[str] = (),
    inert: Collection[str] = (),
    apart: Collection[str] = (),
) -> Method:
    """Return the modules in the file, their config checked.

    Args:
        config: the object in `adapter_config.json`.
        tensors: the file beside it.
        where: the directory, for messages.
        names: how names of the method's tensors end: "hada_w1_a".
        read: keys of the config that the method's reader looks at.
        inert: keys of the method that change nothing after training.
        apart: whole names of tensors that belong to no module.

    Raises:
        FormatError: a key or a tensor means something else, or they disagree.
    """
    config_where = f"{where}/{CONFIG_NAME}"
    _check_keys(config, {*_READ, *read}, {*_INERT, *inert}, config_where)
    by_target: dict[str, Held] = {}
    saved = []
    for name, tensor in tensors.header.tensors.items():
        if name in apart:
            continue
        last = next((last for last in names if name.endswith(f".{last}")), None)
        if last is not None and name.startswith(PREFIX):
            key = name.removeprefix(PREFIX).removesuffix(f".{last}")
            target = without_prefix(key)
            held = by_target.setdefault(target, Held(key, target))
            if last in held.tensors or held.key != key:
                raise FormatError(
                    f"two tensors are {last} of {target}", where=f"{where}/{WEIGHTS_NAME}"
                )
            held.tensors[last] = tensor
        else:
            saved.append(_saved(name, tensor, config, f"{where}/{WEIGHTS_NAME}"))
    if not by_target:
        raise FormatError(
            f"the file holds no tensors of {config['peft_type']}",
            where=f"{where}/{WEIGHTS_NAME}",
        )
    held_all = tuple(by_target[target] for target in sorted(by_target))
    budget = Budget()
    modules = {replacement.name.rpartition(".")[0] for replacement in saved}
    check_targets(config, [held.key for held in held_all], config_where, modules, budget)
    replaced = tuple(sorted(saved, key=lambda replacement: replacement.name))
    return Method(config, tensors, where, held_all, replaced, budget)


def number(config: Mapping[str, Any], key: str, default: float, where: str) -> float:
    """Return a finite number of the config; `FormatError` if it is none."""
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise FormatError(f"{key} is {value!r}, expected a number", where=where)
    if not is_alpha(value):
        raise FormatError(f"{key} is {value!r}, expected a finite number", where=where)
    return float(value)


def whole_number(config: Mapping[str, Any], key: str, default: int, where: str) -> int:
    """Return an integer of the config, at least 1; `FormatError` if it is none."""
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise FormatError(
            f"{key} is {value!r}, expected an integer of at least 1", where=where
        )
    return value


def check_patterns(config: Mapping[str, Any], where: str) -> None:
    """Raise `FormatError` unless r and alpha, and their patterns, are such numbers.

    LoHa and LoKr call them as LoRA does, but for `alpha`.
    """
    for key, pattern, read in (
        ("r", "rank_pattern", whole_number),
        ("alpha", "alpha_pattern", number),
    ):
        read(config, key, 8, where)
        values = config.get(pattern) or {}
        if not isinstance(values, dict):
            raise FormatError(
                f"{pattern} is {_short(values)}, expected an object", where=where
            )
        for name in values:
            read(values, name, 8, f"{where}#/{pattern}")


def labels(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the config says of base and task, as `AdapterSource` calls it."""
    return {
        "base_name": config.get("base_model_name_or_path"),
        "base_revision": config.get("revision"),
        "task_type": config.get("task_type"),
    }


# ── config and names ─────────────────────────────────────────────────────────────────


def _check_keys(
    config: Mapping[str, Any], read: Collection[str], inert: Collection[str], where: str
) -> None:
    for key, value in config.items():
        is_neutral = value is None or value is False or value in ([], {}, "none")
        if key not in read and key not in inert and not is_neutral:
            raise FormatError(
                f"{key} is {_short(value)}, which is not read with peft_type "
                f"{config['peft_type']!r}: it may change what the adapter does",
                where=where,
                hint="remove the key if it belongs to a tool and means nothing to PEFT",
            )
    for key in ("base_model_name_or_path", "revision"):
        if not isinstance(config.get(key), str | None):
            raise FormatError(
                f"{key} is {_short(config[key])}, expected a text or null", where=where
            )
    task = config.get("task_type")
    if task is not None and (not isinstance(task, str) or task not in TASK_TYPES):
        raise FormatError(
            f"task_type is {_short(task)}, expected one of "
            f"{', '.join(sorted(TASK_TYPES))}, or null",
            where=where,
        )
    for key in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
        value = config.get(key)
        if not is_names(value):
            raise FormatError(
                f"{key} is {_short(value)}, expected a list of names, or one regular "
                "expression",
                where=where,
            )
    if isinstance(config.get("modules_to_save"), str):
        raise FormatError(
            f"modules_to_save is {_short(config['modules_to_save'])}, expected a list of "
            "names",
            where=where,
        )
    layers = config.get("layers_to_transform")
    chosen = layers if isinstance(layers, list) else [layers]
    if layers is not None and not all(type(item) is int for item in chosen):
        raise FormatError(
            f"layers_to_transform is {_short(layers)}, expected a list of numbers",
            where=where,
        )


def is_names(value: Any) -> bool:
    """Return whether a value of the config is a list of names, a text, or null."""
    return (
        value is None
        or isinstance(value, str)
        or (isinstance(value, list) and all(isinstance(item, str) for item in value))
    )


def _saved(
    name: str, tensor: TensorInfo, config: Mapping[str, Any], where: str
) -> Replacement:
    """Return a tensor of a whole module that PEFT saves with the adapter."""
    endings = saved_names(config)
    target = without_prefix(name)
    parts = target.split(".")
    modules = [".".join(parts[:end]) for end in range(1, len(parts))]
    # PEFT compares plain endings: "classifier" means "pre_classifier" too.
    is_listed = any(module.endswith(endings) for module in modules)
    if not name.startswith(PREFIX) or not is_listed:
        raise FormatError(
            f"the tensor {name!r} is none of {config['peft_type']}, and modules_to_save "
            "does not name it",
            where=where,
        )
    return Replacement(name=target, role="modules_to_save", tensor=tensor)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
