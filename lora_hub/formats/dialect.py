"""`Dialect`: one way to keep an adapter in files, as a row of the table in `detect.py`.

Reading and writing are functions over bytes. What a caller alone can know, such as the
base whose module names a dialect mangles, comes as a value.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lora_hub.formats.factors import Chunks
from lora_hub.formats.source import AdapterSource
from lora_hub.tensors.header import Header

ScaleFrom = Literal["alpha", "scale"]

# What an adapter may need said, and only some dialects can say → in words.
FEATURES = {
    "language": "targets of a language model (`model.layers.…`)",
    "components": "targets in components of a pipeline (`unet.…`, `text_encoder.…`)",
    "ranks": "unlike ranks",
    "scalings": "unlike scalings",
    "rslora": "rsLoRA, where no alpha/rank is the same number",
    "alpha64": "an alpha that is no float32",
    "float64": "factors in float64",
    "embeddings": "updates of embeddings",
    "convolutions": "updates of convolutions",
    "experts": "updates of experts",
    "dora": "magnitudes (DoRA)",
    "lora_bias": "biases beside the factors",
    "replaced": "whole tensors of the base, trained anew",
    "rows": "rows of an embedding, trained anew",
    "scales": "factors on outputs or inputs (IA3)",
    "alora": "acting only from invocation tokens on (aLoRA)",
    "ties": "one update for two tied embeddings",
}


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """What the caller says because no file does.

    Attributes:
        base: folder of the base, for dialects whose names need its list of modules.
        scale_from: which of MLX's two numbers holds where both are set.
        alpha: loralib's `lora_alpha`.
        enable_lora: loralib's, which parts of a merged layer (q, k and v) are adapted.
        initial: folder of the factors as they were before training, for methods that
            begin by taking them out of the base's weights (PiSSA, OLoRA, CorDA).
    """

    base: Path | None = None
    scale_from: ScaleFrom | None = None
    alpha: float | None = None
    initial: Path | None = None
    enable_lora: tuple[bool, ...] | None = None


@dataclass(frozen=True, slots=True)
class Given:
    """The files of one adapter.

    Attributes:
        where: the folder.
        weights_name: the file whose bytes `weights` are.
        config: the object in adapter_config.json, {} for dialects without.
    """

    where: str
    weights_name: str
    weights: bytes
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def weights_where(self) -> str:
        return f"{self.where}/{self.weights_name}"


@dataclass(frozen=True, slots=True)
class Glance:
    """What the first bytes of a file of weights tell; `header` is None for GGUF."""

    name: str
    magic: bytes
    header: Header | None


@dataclass(frozen=True, slots=True)
class Written:
    """An adapter in a dialect.

    Attributes:
        files: name → content in pieces.
        notes: what a person should know, a sentence each.
    """

    files: Mapping[str, Chunks]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Dialect:
    """One way to keep an adapter in files.

    Attributes:
        name: as `--to` and `--from` take it.
        title: whose it is, in messages.
        weights_name: the file it is written to.
        says: which of `FEATURES` it can say.
        read: the files, what the caller says → the adapter.
        write: the adapter, the base's folder if given → files; raises `LossyConversion`.
        claim_config: evidence that an adapter_config.json is of this dialect, or None.
        claim_weights: evidence that a file alone is of this dialect, or None.
        check_config: raises `FormatError` where the config says what is not read.
    """

    name: str
    title: str
    weights_name: str
    says: frozenset[str]
    read: Callable[[Given, ReadOptions], AdapterSource]
    write: Callable[[AdapterSource, Path | None], Written]
    claim_config: Callable[[Mapping[str, Any]], str | None] | None = None
    claim_weights: Callable[[Glance], str | None] | None = None
    check_config: Callable[[Mapping[str, Any], str], None] | None = None
