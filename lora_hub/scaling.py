"""The one function that computes a scaling: what multiplies `b @ a`.

Sources: Hu et al. 2021 (arXiv:2106.09685) section 4.1 for alpha/r; Kalajdzievski 2023
(arXiv:2312.03732) for alpha/√r, called rsLoRA.
"""

import math
from typing import Literal

ScalingRule = Literal["alpha/r", "alpha/sqrt(r)"]

# Beyond this, an alpha is a mistake, and its square no float.
_MAX_ALPHA = 1e150


def is_alpha(value: float) -> bool:
    """Return whether a number may be an alpha or a scale: finite, and at most 1e150."""
    # Not math.isfinite, which fails for integers that no float holds. False for NaN.
    return abs(value) <= _MAX_ALPHA


def scaling(alpha: float, rank: int, rule: ScalingRule) -> float:
    """Return the scaling of an update with this alpha and rank (rank ≥ 1)."""
    return alpha / rank if rule == "alpha/r" else alpha / math.sqrt(rank)


def alpha_of(wanted: float, rank: int, rule: ScalingRule) -> float:
    """Return the alpha whose scaling is `wanted`, or the nearest one there is.

    Of several alphas with one scaling, the shortest in decimal digits: what a person wrote.
    """
    near = [wanted * (rank if rule == "alpha/r" else math.sqrt(rank))]
    for end in (math.inf, -math.inf):
        step = near[0]
        for _ in range(2):  # two roundings on the way there, so two neighbours suffice
            step = math.nextafter(step, end)
            near.append(step)
    return min(
        near, key=lambda alpha: (abs(scaling(alpha, rank, rule) - wanted), len(repr(alpha)))
    )


def spell(wanted: float, rank: int) -> tuple[float, ScalingRule]:
    """Return alpha and rule of a scaling that a file holds as it is.

    Exact in float64 by one of the rules wherever that can be. Where it cannot (for a part
    of the numbers, at ranks that are no power of two), the scaling is a neighbour of
    `wanted`, 1 part in 2**52 away: nothing to a tool that multiplies in float32.
    """
    rules: tuple[ScalingRule, ScalingRule] = ("alpha/r", "alpha/sqrt(r)")
    for rule in rules:
        alpha = alpha_of(wanted, rank, rule)
        if scaling(alpha, rank, rule) == wanted:
            return alpha, rule
    return alpha_of(wanted, rank, "alpha/r"), "alpha/r"
