"""`AdapterSource`: what an adapter on disk says, the only value that crosses the wall.

Names, shapes and scalings are resolved; bytes are read when asked for. The packaging half
makes it, the tensor half (`adapter/load.py`) turns it into tensors. Neither half knows
more of the other.
"""

from dataclasses import dataclass

from lora_hub.scaling import ScalingRule, scaling
from lora_hub.tensors.file import TensorFile
from lora_hub.tensors.header import TensorInfo


@dataclass(frozen=True, slots=True)
class UpdateSource:
    """One target's low-rank update on disk: `scaling * b @ a`.

    `a` is (rank, in_features), `b` is (out_features, rank); both name tensors of the file.
    """

    target: str
    rank: int
    alpha: float
    rule: ScalingRule
    a: TensorInfo
    b: TensorInfo

    @property
    def scaling(self) -> float:
        return scaling(self.alpha, self.rank, self.rule)


@dataclass(frozen=True, slots=True)
class AdapterSource:
    """A whole adapter on disk.

    Attributes:
        updates: in order of their targets' names; every tensor of the file is in exactly
            one of them.
        tensors: the file whose bytes the updates name.
        base_name: what the author called the base; a hint, never an identity.
        base_revision: the revision of the base the author pinned, seldom given.
        task_type: PEFT's task type, e.g. CAUSAL_LM.
    """

    updates: tuple[UpdateSource, ...]
    tensors: TensorFile
    base_name: str | None = None
    base_revision: str | None = None
    task_type: str | None = None
