"""The one function that computes a scaling: what multiplies `b @ a`.

Sources: Hu et al. 2021 (arXiv:2106.09685) section 4.1 for alpha/r; Kalajdzievski 2023
(arXiv:2312.03732) for alpha/√r, called rsLoRA.
"""

import math
from typing import Literal

ScalingRule = Literal["alpha/r", "alpha/sqrt(r)"]


def scaling(alpha: float, rank: int, rule: ScalingRule) -> float:
    """Return the scaling of an update with this alpha and rank (rank ≥ 1)."""
    return alpha / rank if rule == "alpha/r" else alpha / math.sqrt(rank)
