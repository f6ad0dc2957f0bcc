"""Updates of unlike scalings and ranks as updates of one scaling, as an engine reads them.

An engine that knows one alpha gives every target the same scaling. Where the scalings are
the same, as in an rsLoRA of one rank, they are said with another alpha and no factor
changes. Where they differ, each `b` takes up the ratio of its own to the one that is
written. That one is chosen so that as many ratios as can be are powers of two, which
round nothing. Ranks are made equal by zeros behind the factors, which is exact.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from lora_hub.errors import LossyConversion
from lora_hub.formats.engines.refused import refusal
from lora_hub.formats.engines.table import Engine
from lora_hub.formats.factors import Factors
from lora_hub.formats.fold import is_power_of_two, padded, times
from lora_hub.scaling import alpha_of

# Half a unit in the last place of float64, for an alpha that is not exact.
_FLOAT64 = 2.0**-53


@dataclass(frozen=True, slots=True)
class OneScaling:
    """Updates that an engine reads right.

    Attributes:
        rank: the largest.
        folded: targets whose `b` took up a ratio.
        rounded: those of them where a number was rounded.
        raised: targets that got more ranks.
        error: the largest relative error of a number of `scaling * b`.
    """

    parts: tuple[Factors, ...]
    rank: int
    folded: tuple[str, ...]
    rounded: tuple[str, ...]
    raised: tuple[str, ...]
    error: float


def with_one_scaling(parts: Sequence[Factors], engine: Engine) -> OneScaling:
    """Return the same updates with one scaling, and one rank where the engine needs it.

    Raises:
        LossyConversion: a ratio is too large for the dtype of a factor, or a rank for
            the engine.
    """
    rank = _rank(max(part.rank for part in parts), engine)
    if engine.has_one_rank:
        return _at_ranks(parts, engine, rank, {part.target: rank for part in parts})
    own = _at_ranks(parts, engine, rank, {part.target: part.rank for part in parts})
    if not own.folded:
        return own
    same = _at_ranks(parts, engine, rank, {part.target: rank for part in parts})
    return min(own, same, key=lambda found: (len(found.rounded), len(found.folded)))


def _rank(largest: int, engine: Engine) -> int:
    if engine.rank_limits and largest > engine.rank_limits[-1]:
        raise refusal(
            engine,
            f"its largest rank is {largest}, and {engine.title} takes at most "
            f"{engine.rank_limits[-1]}",
        )
    return -(-largest // engine.rank_step) * engine.rank_step


def _at_ranks(
    parts: Sequence[Factors], engine: Engine, rank: int, ranks: Mapping[str, int]
) -> OneScaling:
    """Return the updates with these ranks, and one alpha over all of them."""
    # The engine divides one alpha by each target's rank, so what must be the same is the
    # scaling times that rank: the alpha that each target would have alone.
    alphas = {part.target: _exact(part) * ranks[part.target] for part in parts}
    chosen = _chosen(list(alphas.values()))
    written = float(chosen)
    if written != chosen:
        written = alpha_of(float(chosen / rank), rank, "alpha/r")
    made, folded, rounded, raised = [], [], [], []
    error = 0.0
    for part in parts:
        b = part.b
        ratio = alphas[part.target] / chosen if chosen else Fraction(0)
        if ratio != 1 and chosen:
            product = times(b, ratio)
            if product is None:
                raise _too_large(part, float(ratio), engine)
            b, off = product
            folded.append(part.target)
            if off:
                rounded.append(part.target)
                error = max(error, off)
        if written / ranks[part.target] * float(ratio) != part.scaling:
            error = max(error, _FLOAT64)
        if ranks[part.target] != part.rank:
            raised.append(part.target)
        made.append(
            replace(
                part,
                alpha=written,
                rule="alpha/r",
                a=padded(part.a, ranks[part.target], 0),
                b=padded(b, ranks[part.target], 1),
            )
        )
    return OneScaling(
        tuple(made), rank, tuple(folded), tuple(rounded), tuple(raised), error
    )


def _exact(part: Factors) -> Fraction:
    """Return the scaling; alpha/rank is meant, not the float64 nearest to it."""
    if part.rule == "alpha/r":
        return Fraction(part.alpha) / part.rank
    return Fraction(part.scaling)


def _chosen(alphas: Sequence[Fraction]) -> Fraction:
    """Return the alpha to write: most others are powers of two away; then the largest.

    The largest of equals, so that no number of `b` grows.
    """
    counts = Counter(alpha for alpha in alphas if alpha)
    if not counts:
        return Fraction(0)

    def worth(candidate: Fraction) -> tuple[int, Fraction]:
        exact = sum(
            count for alpha, count in counts.items() if is_power_of_two(alpha / candidate)
        )
        return exact, abs(candidate)

    return max(sorted(counts), key=worth)


def _too_large(part: Factors, ratio: float, engine: Engine) -> LossyConversion:
    return refusal(
        engine,
        f"{part.target} is scaled {ratio:g} times as much as others, which its "
        f"{part.b.dtype} factors cannot take up",
    )


Told = Callable[[OneScaling, Engine], str | None]


def notes(found: OneScaling, engine: Engine) -> tuple[str, ...]:
    """Return what was done to the numbers, a sentence each."""
    told: tuple[Told, ...] = (_told_ranks, _told_folds)
    return tuple(text for tell in told if (text := tell(found, engine)))


def _told_ranks(found: OneScaling, engine: Engine) -> str | None:
    limits = [limit for limit in engine.rank_limits if limit >= found.rank]
    flag = f"; start {engine.title} with {engine.rank_flag} {(limits or [found.rank])[0]}"
    text = f"the rank is {found.rank}"
    if found.raised:
        text += f", {len(found.raised)} targets have zeros behind theirs, which is exact"
    if engine.rank_flag:
        text += f"{flag} or more"
        if limits:
            text += f" ({', '.join(map(str, engine.rank_limits))} are allowed)"
    return text if found.raised or engine.rank_flag else None


def _told_folds(found: OneScaling, engine: Engine) -> str | None:
    if not found.folded:
        return None
    text = (
        f"{engine.title} knows one scaling, so `b` of {len(found.folded)} targets took up "
        "the ratio of its own"
    )
    if not found.rounded:
        return f"{text}, a power of two each, which is exact"
    return (
        f"{text}; {len(found.rounded)} were rounded once, by {found.error:.1e} of a number "
        "at most"
    )
