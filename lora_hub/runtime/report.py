"""What loading an adapter comes to: how its base was compared, and how that is said."""

from collections.abc import Callable
from dataclasses import dataclass

from lora_hub.adapter.adapter import Adapter
from lora_hub.base.fit import Fit, check_fit
from lora_hub.errors import InconclusiveError
from lora_hub.manifest.document import Policy
from lora_hub.runtime.base_view import ModelBase


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What loading an adapter came to; `str` of it is a sentence.

    Attributes:
        name: by which the host knows the adapter.
        version: of its package, None where it has none.
        digest: its package digest, None where it has none.
        targets: how many targets and replaced tensors it has; every one of them was found
            in the model.
        fit: how the base was checked; None where the adapter does not say which it is.
        notes: what else a person should hear.
    """

    name: str
    version: str | None
    digest: str | None
    targets: int
    fit: Fit | None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        called = f"{self.name} {self.version}" if self.version else self.name
        return "; ".join(
            (
                f"{called}: {self.targets} of {self.targets} targets applied",
                _said(self.fit),
                *self.notes,
            )
        )


def _said(fit: Fit | None) -> str:
    if fit is None:
        return "its base was not identified, only names and shapes were compared"
    if not fit.checked:
        return fit.note
    checked = f"{fit.checked} of {fit.total} tensors of the base are as recorded"
    return f"{checked} ({fit.note})" if fit.note else checked


def fit_of(
    adapter: Adapter, view: Callable[[], ModelBase], policy: Policy | None, name: str
) -> Fit | None:
    """Return how the adapter's recorded base was found to be the model.

    None where the adapter records none: then `view` is not asked what the model is. `name`
    is what to call the adapter in messages.

    Raises:
        FitError: the model is another base.
        InconclusiveError: the policy asks about the weights of a base nobody recorded.
    """
    if adapter.base is not None:
        return check_fit(adapter.base, view(), policy=policy)
    if policy in {"targets", "exact"}:
        raise InconclusiveError(
            f"the adapter does not say which base it was made for, so policy {policy!r} "
            "cannot be checked",
            where=name,
            hint="pack the adapter with its base, or load it with policy='struct'",
        )
    return None


def unidentified(adapter: Adapter) -> tuple[str, ...]:
    """Say which targets of a composed adapter nobody compared with a recorded base."""
    if adapter.base is None:
        return ()
    recorded = {each.name for each in adapter.base.targets}
    changed = {
        target if update.layer == "experts" else f"{target}.weight"
        for target, update in adapter.updates.items()
    }
    count = len((changed | adapter.replaced.keys()) - recorded)
    if not count:
        return ()
    return (f"{count} of its targets come from an adapter whose base was not identified",)
