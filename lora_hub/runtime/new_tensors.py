"""The tensors a module's twin has in the place of the module's own, for each set.

Replaced ones are kept (`replaced.py`); experts' weights are lazy and made for each call
(`experts.py`). What cannot be done is refused before anything acts.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_hub.errors import ComposeError, FitError
from lora_hub.runtime.experts import Term, changed
from lora_hub.runtime.replaced import Kept, Part, names_of, parts_of
from lora_hub.runtime.resident import Factors, Resident
from lora_hub.runtime.route import Set

# Types whose parameters another module reads without calling them.
_READ_BY_OTHERS = frozenset({"DbrxExpertGLU"})


@dataclass(frozen=True, slots=True, eq=False)
class Recipe:
    """What some adapters do to one module's tensors: name → parts, name → factors."""

    acting: Set
    parts: Mapping[str, Sequence[Part]]
    experts: Mapping[str, list[tuple[Factors, float]]]


class NewTensors:
    """The tensors of one module, as sets of adapters have them.

    Attributes:
        site: its number among the layers that are added to, None where it has none.
    """

    def __init__(self, module: nn.Module) -> None:
        self.site: int | None = None
        self._module = module
        self._kept: dict[str, Kept] = {}
        self._good: set[object] = set()  # what was found finite

    @property
    def kept_bytes(self) -> int:
        """Bytes of what is kept beside the module's own."""
        return sum(each.nbytes for each in self._kept.values())

    def check(
        self, acting: Set, site: int | None, path: Callable[[nn.Module, str], str]
    ) -> None:
        """Refuse what cannot be done.

        Args:
            acting: adapters with their weights.
            site: as the attribute will be.
            path: gives a tensor's full name.

        Raises:
            ComposeError, FitError: as `Twins.put_on`.
        """
        module = self._module
        for name, parts in parts_of(acting, module, site).items():
            own = _own(module, name)
            _check_replaced(own, parts, acting, functools.partial(path, module, name))
            key = tuple((resident.key, weight) for resident, weight in acting), name
            if key in self._good or own.is_meta or not own.is_floating_point():
                continue
            if not self._kept_of(name).is_finite(own, acting, parts):
                raise _not_finite(path(module, name))
            self._good.add(key)
        for name, found in _experts(acting, module).items():
            _check_experts(module, found, path(module, name))

    def here(self, acting: Set) -> Set:
        """Return those of a set that have a say in the module's tensors."""
        if not any(_changes(resident, self._module) for resident, _ in acting):
            return ()
        return tuple(
            (resident, weight)
            for resident, weight in acting
            if _changes(resident, self._module) or _scales(resident, self.site)
        )

    def recipe(self, acting: Set) -> Recipe:
        """Return what makes the tensors of these adapters, from `here`."""
        parts = parts_of(acting, self._module, self.site)
        return Recipe(acting, parts, _experts(acting, self._module))

    def of(self, module: nn.Module, recipe: Recipe) -> dict[str, Tensor]:
        """Return name → tensor of the module's twin, for one call.

        Args:
            module: this one, or a copy of it.
            recipe: of what acts.
        """
        tensors: dict[str, Tensor] = {}
        for name, parts in recipe.parts.items():
            own = _own(module, name)
            tensors[name] = self._kept_of(name).tensor(own, recipe.acting, parts)
        for name, found in recipe.experts.items():
            own = tensors.get(name, _own(module, name))
            tensors[name] = changed(own, _terms(module, own, found))
        return tensors

    def _kept_of(self, name: str) -> Kept:
        found = self._kept.get(name)
        if found is None:
            found = self._kept[name] = Kept(self._module)
        return found


def _changes(resident: Resident, module: nn.Module) -> bool:
    return any(
        (module, name) in resident.replaced or (module, name) in resident.experts
        for name in names_of(module)
    )


def _scales(resident: Resident, site: int | None) -> bool:
    update = None if site is None else resident.at.get(site)
    return update is not None and any(
        each is not None for each in (update.p, update.q, update.bias_scale)
    )


def _experts(acting: Set, module: nn.Module) -> dict[str, list[tuple[Factors, float]]]:
    found: dict[str, list[tuple[Factors, float]]] = {}
    for name in names_of(module):
        for resident, weight in acting:
            factors = resident.experts.get((module, name))
            if factors is not None:
                found.setdefault(name, []).append((factors, weight))
    return found


def _terms(
    module: nn.Module, own: Tensor, found: list[tuple[Factors, float]]
) -> list[Term]:
    terms = []
    for factors, weight in found:
        a, bt = factors.a, factors.bt
        if own.dim() == 2:  # counts as one expert and is (out, in) always
            a, bt = a[0], bt[0]
        elif getattr(module, "is_transposed", False):
            terms.append(Term(weight, a, bt))
            continue
        terms.append(Term(weight, bt, a))
    return terms


def _own(module: nn.Module, name: str) -> Tensor:
    held = module._parameters if name in module._parameters else module._buffers  # noqa: SLF001
    own = held[name]
    assert own is not None
    return own


def _check_replaced(
    own: Tensor, parts: list[Part], acting: Set, where: Callable[[], str]
) -> None:
    is_alone = [part.weight for part in parts] == [1.0]
    news = [part.replaced for part in parts if part.replaced is not None]
    if not own.is_floating_point():
        if not is_alone:
            raise ComposeError(
                f"a replaced tensor of {own.dtype} has no weighted sum",
                where=where(),
                hint="use the adapter alone, with weight 1",
            )
        if any(new.tensor.is_floating_point() for new in news):
            raise FitError(
                f"the tensor is held in {own.dtype} and the adapter's in "
                f"{news[0].tensor.dtype}",
                where=where(),
                hint="load the model without quantisation",
            )
    is_own_kind = type(own).__torch_dispatch__ is not Tensor.__torch_dispatch__
    if is_own_kind and not (len(parts) == 1 and parts[0].is_as_brought):
        raise FitError(
            f"the tensor is held as a {type(own).__name__}, of which no part can be "
            "replaced and which cannot be weighted",
            where=where(),
            hint="load the model without quantisation",
        )
    if any(part.scales for part in parts) and any(
        resident.tokens for resident, _ in acting
    ):
        raise FitError(
            "an adapter acts from its invocation tokens on, and scales a weight that is "
            "replaced for all tokens",
            where=where(),
            hint="use the adapters one at a time",
        )


def _check_experts(
    module: nn.Module, terms: list[tuple[Factors, float]], where: str
) -> None:
    if type(module).__name__ in _READ_BY_OTHERS:
        raise FitError(
            f"the experts of a {type(module).__name__} are read by another module, which "
            "would not see the change",
            where=where,
            hint="merge the adapter into the base",
        )
    for factors, weight in terms:
        others = factors.p, factors.q, factors.bias, factors.bias_scale
        if any(each is not None for each in others):
            raise FitError(
                "the update of the experts has more than factors, which is not known to "
                "act on them",
                where=where,
            )
        if abs(weight) * factors.largest > torch.finfo(factors.bt.dtype).max:
            raise _not_finite(where)


def _not_finite(where: str) -> ComposeError:
    return ComposeError(
        "the adapters and their weights make numbers that are not finite in the dtype "
        "which is computed in",
        where=where,
        hint="give smaller weights; `lorahub validate` finds NaN in adapters",
    )
