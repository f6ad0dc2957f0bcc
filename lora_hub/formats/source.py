"""`AdapterSource`: what an adapter on disk says, the only value that crosses the wall.

Names, shapes and scalings are resolved; bytes are read when asked for. The packaging half
makes it, the tensor half (`adapter/load.py`) turns it into tensors. Neither half knows
more of the other.
"""

from dataclasses import dataclass
from typing import Literal

from lora_hub.manifest.document import Layer, Role
from lora_hub.scaling import ScalingRule, scaling
from lora_hub.tensors.file import TensorFile
from lora_hub.tensors.header import TensorInfo


@dataclass(frozen=True, slots=True)
class UpdateSource:
    """One target's low-rank update on disk: `scaling * b @ a`.

    `a` and `b` name tensors of the file, whose shapes follow from the layer:

        linear     a (rank, in_features)             b (out_features, rank)
        embedding  a (rank, num_embeddings)          b (embedding_dim, rank)
        conv       a (rank, in_channels, *kernel)    b (out_channels, rank/groups, 1, …)
        experts    a (experts*rank, in_features)     b (out_features, rank*experts)

    A convolution has one to three axes of kernel; with groups, `a` sees all channels and
    `b` works by groups. The first axis of the experts' `a` counts experts first and ranks
    within, the last of their `b` ranks first and experts within, as PEFT lays them out.

    Attributes:
        target: path of a module; of a parameter for experts.
        rank: of one expert.
        magnitude: DoRA's m, one number for each output; then the weight is
            `m * (W + Δ) / ‖W + Δ‖`, norms over the inputs.
        bias: (out_features,), added to the output times the scaling (PEFT's lora_bias).
    """

    target: str
    rank: int
    alpha: float
    rule: ScalingRule
    a: TensorInfo
    b: TensorInfo
    layer: Layer = "linear"
    magnitude: TensorInfo | None = None
    bias: TensorInfo | None = None

    @property
    def scaling(self) -> float:
        return scaling(self.alpha, self.rank, self.rule)

    @property
    def weight(self) -> str:
        """The name of the base's tensor that changes."""
        return self.target if self.layer == "experts" else f"{self.target}.weight"

    @property
    def experts(self) -> int:
        """How many experts share the factors; 1 for other layers."""
        return self.a.shape[0] // self.rank if self.layer == "experts" else 1

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """All tensors of the file that this update consists of."""
        found = (self.a, self.b, self.magnitude, self.bias)
        return tuple(tensor for tensor in found if tensor is not None)


@dataclass(frozen=True, slots=True)
class ScaleSource:
    """Factors on a target's outputs or inputs: IA3's `l`, where 1 changes nothing.

    Attributes:
        axis: "rows" scales what the layer gives (its bias too), "columns" what it takes.
        vector: as many numbers as there are outputs or inputs, in any shape.
    """

    target: str
    axis: Literal["rows", "columns"]
    vector: TensorInfo

    @property
    def weight(self) -> str:
        """The name of the base's tensor that changes."""
        return f"{self.target}.weight"


@dataclass(frozen=True, slots=True)
class Replacement:
    """A tensor of the base, or some rows of one, that the adapter brings anew.

    Attributes:
        name: of the base's tensor: `score.weight`, `model.embed_tokens.weight`.
        role: why.
        tensor: the new numbers: the whole tensor, or one row for each of `rows`.
        rows: which rows along the first axis; None replaces the whole. Where the base ties
            its embeddings, rows of the input embedding are the output embedding's too,
            unless that has rows of its own.
    """

    name: str
    role: Role
    tensor: TensorInfo
    rows: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class AdapterSource:
    """A whole adapter on disk.

    Every tensor of the file is in exactly one update, scale or replacement.

    Attributes:
        updates: in order of their targets' names.
        tensors: the file whose bytes the updates name.
        base_name: what the author called the base; a hint, never an identity.
        base_revision: the revision of the base the author pinned, seldom given.
        task_type: PEFT's task type, e.g. CAUSAL_LM.
        scales: in order of their targets' names.
        replacements: in order of their names; they come before the updates, which act on
            the new weight where both name one tensor.
        alora_tokens: the invocation tokens of an aLoRA: the adapter acts only from their
            last occurrence on. Empty where it acts always.
        ties_weights: whether an update of the input embedding is meant for the output
            embedding tied to it too (PEFT's ensure_weight_tying).
    """

    updates: tuple[UpdateSource, ...]
    tensors: TensorFile
    base_name: str | None = None
    base_revision: str | None = None
    task_type: str | None = None
    scales: tuple[ScaleSource, ...] = ()
    replacements: tuple[Replacement, ...] = ()
    alora_tokens: tuple[int, ...] = ()
    ties_weights: bool = False

    @property
    def weights(self) -> tuple[str, ...]:
        """The names of the base's tensors that change, in order of names."""
        parts = (
            {update.weight for update in self.updates},
            {scale.weight for scale in self.scales},
            {replacement.name for replacement in self.replacements},
        )
        return tuple(sorted(set().union(*parts)))
