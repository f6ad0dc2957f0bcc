"""Which tensors of a result an adapter has a say in, and what it does to each.

Adapters name what the running model has; here each of their updates, scales and
replacements is brought to the tensors that the base's files hold. One update may change
several (its bias; experts that are stored one by one), several may change one. Loads no
torch: `plan.py` prints what is found, `numbers.py` computes it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

from lora_hub.base.folder import FolderBase
from lora_hub.base.orientation import stores_transposed
from lora_hub.base.stored import Stored
from lora_hub.base.structure import check_structure
from lora_hub.errors import ComposeError, FitError
from lora_hub.formats.source import AdapterSource, Replacement, ScaleSource, UpdateSource
from lora_hub.merging import ties

Aspect = Literal["weight", "bias"]


@dataclass(frozen=True, slots=True)
class Change:
    """What one part adds to one tensor.

    Attributes:
        part: index of the part.
        source: the update or the scales.
        aspect: whether the tensor is the layer's weight, or its bias as a matrix of one
            column.
        is_transposed: whether the tensor holds its matrix as (in, out).
        expert: which expert's matrix the tensor is; None for a tensor that holds all of
            them, and for layers without.
        rows: first row and the one behind the last that the tensor holds of the matrix;
            None: all of them.
    """

    part: int
    source: UpdateSource | ScaleSource
    aspect: Aspect = "weight"
    is_transposed: bool = False
    expert: int | None = None
    rows: tuple[int, int] | None = None

    @property
    def word(self) -> str:
        """What it is called in a plan."""
        if self.aspect == "bias":
            return "bias"
        if isinstance(self.source, ScaleSource):
            return "scales"
        return "LoRA" if self.source.magnitude is None else "DoRA"


@dataclass(frozen=True, slots=True)
class Exchange:
    """A tensor, or some rows of it, for which one part brings new numbers.

    Attributes:
        part: index of the part.
        source: the new numbers.
        start: of them, the first that belongs to the tensor; counts elements.
    """

    part: int
    source: Replacement
    start: int = 0

    @property
    def word(self) -> str:
        """What it is called in a plan."""
        rows = self.source.rows
        return "new numbers" if rows is None else f"{len(rows)} new rows"


@dataclass(frozen=True, slots=True)
class Fate:
    """All that happens to one tensor of the result.

    Attributes:
        name: in the result.
        base: the base's tensor that it is without the adapters; None for one that the
            base does not have.
        exchanges: come first, in order of the parts.
        changes: act on what was exchanged.
    """

    name: str
    base: str | None
    exchanges: tuple[Exchange, ...] = ()
    changes: tuple[Change, ...] = ()

    @property
    def parts(self) -> tuple[int, ...]:
        """The indices of the parts that have a say."""
        return tuple(sorted({step.part for step in self.steps}))

    @property
    def words(self) -> tuple[str, ...]:
        """What happens, in words, each once."""
        return tuple(dict.fromkeys(step.word for step in self.steps))

    @property
    def steps(self) -> "tuple[Step, ...]":
        """All that happens, what is exchanged first."""
        return (*self.exchanges, *self.changes)


Step = Change | Exchange
Places = Mapping[str, Stored]


def fates(
    sources: Sequence[AdapterSource], base: FolderBase, tie: ties.Tie | None
) -> dict[str, Fate]:
    """Return the fates of all tensors that are not taken over as they are, by name.

    Args:
        sources: the parts, in their order.
        base: the base.
        tie: its embedding that is tied to a head, see `ties.tie_of`.

    Raises:
        FitError: a part does not fit the base, or it would change a tied embedding and
            its head unlike, or the base has no place for a bias.
        ComposeError: what a part does cannot be merged.
    """
    found: dict[str, Fate] = {}
    if tie is not None and tie.is_undone:
        for name in tie.uses:
            held = name if name in base.tensors else tie.tensors[0]
            found[name] = Fate(name, held)
    for part, source in enumerate(sources):
        _check_acts_always(source)
        homes = check_structure(source, base).places
        for name, step in _steps(part, source, homes, base):
            is_weight = isinstance(step, Exchange) or step.aspect == "weight"
            goes_to = ties.places(name, step.source, source, tie) if is_weight else (name,)
            for place in goes_to:
                known = place if place in base.tensors else None
                found[place] = _with(found.get(place) or Fate(place, known), step)
    return found


def _steps(
    part: int, source: AdapterSource, known: Places, base: FolderBase
) -> Iterator[tuple[str, Step]]:
    """Give the names of tensors in the files, and what is done to each."""
    for replacement in source.replacements:
        yield from _exchanges(part, replacement, known, base)
    for update in source.updates:
        _check_ungrouped(update, known)
        yield from _weight(part, update, known, base)
        if update.bias is not None:
            yield _bias(update, known), Change(part, update, "bias")
    for scale in source.scales:
        yield from _weight(part, scale, known, base)
        bias = known.get(f"{scale.target}.bias")
        if scale.axis == "rows" and bias is not None:
            yield bias.parts[0], Change(part, scale, "bias")


def _weight(
    part: int, source: UpdateSource | ScaleSource, known: Places, base: FolderBase
) -> Iterator[tuple[str, Change]]:
    home = known[source.weight]
    layer = source.layer if isinstance(source, UpdateSource) else "linear"
    # One expert may be stored as a matrix, which PEFT takes as (out, in) always.
    is_single = layer == "experts" and len(home.shape) == 2
    is_transposed = not is_single and stores_transposed(
        layer, source.target, base.config.model_type
    )
    change = Change(part, source, is_transposed=is_transposed)
    if len(home.parts) == 1:
        yield home.parts[0], replace(change, expert=0 if is_single else None)
        return
    # Stored one by one: each expert's tensors, in the order in which they are fused.
    per_expert = len(home.parts) // home.shape[0]
    height = home.shape[1] // per_expert
    for index, name in enumerate(home.parts):
        expert, nth = divmod(index, per_expert)
        rows = (nth * height, (nth + 1) * height)
        yield name, replace(change, expert=expert, rows=rows)


def _exchanges(
    part: int, replacement: Replacement, known: Places, base: FolderBase
) -> Iterator[tuple[str, Exchange]]:
    rows = replacement.rows
    if rows is not None and len(set(rows)) < len(rows):
        twice = next(row for row in rows if rows.count(row) > 1)
        raise ComposeError(f"the row {twice} is given twice", where=replacement.name)
    home = known.get(replacement.name)
    if home is None:
        yield replacement.name, Exchange(part, replacement)
        return
    start = 0
    for name in home.parts:
        yield name, Exchange(part, replacement, start)
        start += prod(base.tensors[name][1])


def _bias(update: UpdateSource, known: Places) -> str:
    home = known.get(f"{update.target}.bias")
    if home is None:
        raise FitError(
            "the adapter has a bias for a layer to which the base gives none, so a merged "
            "model would have no place for it",
            where=update.target,
            hint="attach the adapter instead",
        )
    return home.parts[0]


def _with(fate: Fate, step: Step) -> Fate:
    if isinstance(step, Exchange):
        return replace(fate, exchanges=(*fate.exchanges, step))
    return replace(fate, changes=(*fate.changes, step))


def _check_acts_always(source: AdapterSource) -> None:
    if source.alora_tokens:
        raise ComposeError(
            "an aLoRA acts only behind its invocation tokens, which weights cannot tell",
            where=source.tensors.where,
            hint="attach the adapter instead",
        )


def _check_ungrouped(update: UpdateSource, known: Places) -> None:
    """Refuse convolutions with groups: their factors mix channels that weights do not."""
    shape = known[update.weight].shape
    if update.layer == "conv" and update.a.shape[1] != shape[1]:
        groups = update.a.shape[1] // shape[1]
        raise ComposeError(
            f"the layer is a convolution with {groups} groups; the adapter's change sees "
            "the channels of all of them, which the layer's weight cannot hold",
            where=update.target,
            hint="attach the adapter instead",
        )
