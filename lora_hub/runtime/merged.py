"""Merge adapters into the weights of a live model, and take that back to the last bit.

    merged = merge(model, [("style/shakespeare", prepared, 0.7)])
    print(merged.report)           # what rounding left of each change, and what it costs
    merged.unmerge()               # every weight has the bits it had

What changes is decided before anything does (`changed.py`); then each tensor is written in
place, some rows at a time, so that its address stays. However many adapters, there is one
sum and one rounding (`adapter/merged_rows.py`): the numbers are those that merging into a
checkpoint writes. A failure in the middle puts back what was written.

Whoever calls makes sure that no forward runs meanwhile: it would see some weights merged
and some not.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lora_hub import digest
from lora_hub.adapter.merged_rows import Scratch
from lora_hub.adapter.tensor_bytes import to_bytes
from lora_hub.errors import InputError
from lora_hub.runtime.changed import Acting, Changed, changes
from lora_hub.runtime.prepare import Prepared
from lora_hub.runtime.pristine import InCheckpoint, InMemory, Keeper, Pristine
from lora_hub.runtime.survived import MergedReport, Survived
from lora_hub.runtime.written import write

Keep = str | Path  # "memory", or a folder


def merge(
    model: nn.Module,
    acting: Iterable[tuple[str, Prepared, float] | Acting],
    *,
    keep: Keep = "memory",
    untie: bool = False,
    verify: bool = False,
    measure: bool = True,
) -> "Merged":
    """Write what the adapters make of the model's weights into them.

    Args:
        model: the adapters were prepared for it, and nothing is merged into it.
        acting: name, what is prepared, weight, and the invocation tokens of an aLoRA; in
            the order in which they are summed.
        keep: "memory" keeps copies of the base's weights in host memory. A folder is the
            checkpoint that the model was loaded from: its numbers are compared with the
            model's now, and read from there by `unmerge`.
        untie: whether tensors with several uses, such as an embedding and its head, become
            several where the adapters change their uses unlike.
        verify: whether to take digests of what was merged, so that `unmerge` notices every
            change, also one that torch does not count.
        measure: whether to find out how much of each change survived the rounding, which
            takes about as long as the rest.

    Raises:
        InputError: `keep` is no checkpoint, a weight no finite number.
        NotFoundError, IntegrityError: the checkpoint does not have the model's numbers.
        ComposeError: an aLoRA; or a merged number is not finite in the weight's dtype.
        FitError: a weight is quantised, sharded, computed or not in memory; or a tensor
            with several uses would change for all, and is meant to for some.

    After an error, or an interrupt, every weight has the bits it had.
    """
    plan = changes(model, acting, untie=untie)
    keeper: Keeper = InMemory(plan.nbytes) if keep == "memory" else InCheckpoint(Path(keep))
    held: list[_Held] = []
    survived: list[Survived] = []
    scratch = Scratch()
    try:
        for each in plan.tensors:
            one = _Held.taken(each, keeper)
            held.append(one)
            with _writing(one.into):
                found = write(each, one.into, scratch, measure=measure)
            survived += () if found is None else (found,)
            one.put_in()
        _wait_for(held)
        for one in held:
            one.seal(verify=verify)
        kept_bytes = sum(one.pristine.nbytes for one in held)
        where = None if keep == "memory" else str(keep)
        report = MergedReport(len(held), tuple(survived), kept_bytes, where, plan.notes)
        return Merged(report, plan.left, held, keeper)
    except BaseException:
        _put_back(held)
        keeper.close()
        raise


class Merged:
    """What was merged, until it is taken back.

    Attributes:
        report: what became of each change, and what being able to take it back costs.
        left: adapters with what of them has no place in weights. They have to act on
            outputs, as they would unmerged, for the model to be right.
    """

    def __init__(
        self,
        report: MergedReport,
        left: tuple[Acting, ...],
        held: "list[_Held]",
        keeper: Keeper,
    ) -> None:
        self.report = report
        self.left = left
        self._held = held
        self._keeper = keeper

    @property
    def is_merged(self) -> bool:
        """Whether something is still to be taken back."""
        return bool(self._held)

    def unmerge(self, *, overwrite: bool = False) -> None:
        """Give every weight the bits it had before the merge.

        A second call does nothing. After an interrupt, the next call goes on.

        Args:
            overwrite: whether to do so also where somebody changed a merged weight; what
                they wrote is then lost.

        Raises:
            InputError: a merged weight was changed or replaced, or converted to another
                dtype, which `overwrite` does not change; nothing is written.
            IntegrityError: the checkpoint does not hold the bytes it held; nothing is
                written.
        """
        for one in self._held:
            one.check_dtype()
            if not overwrite:
                one.check_untouched()
        for one in self._held:
            one.pristine.check()
        _put_back(self._held)
        self._keeper.close()


@dataclass(slots=True, eq=False)
class _Held:
    """One tensor that is merged into, and how to take that back.

    Attributes:
        changed: which tensor, and what becomes of it.
        into: what is written to: the tensor, or one of its own for some of its uses.
        dtype: of both.
        pristine: the numbers it had.
        version: torch's count of its changes once it was merged; None where it counts none.
        digest: of its bytes once it was merged, None where the count is enough.
    """

    changed: Changed
    into: Tensor
    dtype: torch.dtype
    pristine: Pristine
    version: int | None = None
    digest: str | None = None

    @classmethod
    def taken(cls, changed: Changed, keeper: Keeper) -> "_Held":
        """Return it with its pristine numbers safe; nothing is written yet."""
        own = changed.tensor
        if not changed.is_split:
            names = [use.full for use in changed.uses]
            return cls(changed, own, own.dtype, keeper.take(names, own))
        with torch.inference_mode(False):
            new = torch.empty_like(own.detach())
            if isinstance(own, nn.Parameter):
                new = nn.Parameter(new, requires_grad=own.requires_grad)
        return cls(changed, new, own.dtype, _Original())

    def put_in(self) -> None:
        """Let a tensor of its own stand where it is used."""
        if self.changed.is_split:
            for use in self.changed.uses:
                use.home[use.name] = self.into

    def put_back(self) -> None:
        """Let the tensor stand where it stood, with the numbers it had."""
        own = self.changed.tensor
        with _writing(own):
            self.pristine.put_back(own)
        for use in self.changed.uses:
            use.home[use.name] = own

    def seal(self, *, verify: bool) -> None:
        """Note what the tensor is now, to tell whether somebody changes it."""
        is_counted = not self.into.is_inference()
        self.version = self.into._version if is_counted else None  # noqa: SLF001
        if verify or not is_counted:
            self.digest = digest.of_bytes(to_bytes(self.into))

    def check_dtype(self) -> None:
        """Refuse a tensor that cannot hold the bits it had.

        Raises:
            InputError: it was converted after the merge.
        """
        if self.changed.tensor.dtype != self.dtype:
            raise InputError(
                f"the weight is {self.changed.tensor.dtype} now, it was {self.dtype} when "
                "it was merged",
                where=self.changed.name,
                hint=f"convert the model back, model.to({self.dtype}), then unmerge",
            )

    def check_untouched(self) -> None:
        """Refuse to overwrite what somebody wrote.

        Raises:
            InputError: the tensor is another one or has other numbers than were merged.
        """
        if any(use.home.get(use.name) is not self.into for use in self.changed.uses):
            problem = "was replaced by another tensor after the merge"
        elif self.version is not None and self.into._version != self.version:  # noqa: SLF001
            problem = "was written to after the merge"
        elif self.digest and digest.of_bytes(to_bytes(self.into)) != self.digest:
            problem = "has other numbers than were merged"
        else:
            return
        raise InputError(
            f"the weight {problem}; taking the merge back would lose that",
            where=self.changed.name,
            hint="unmerge(overwrite=True) gives it the base's numbers all the same",
        )


class _Original:
    """The tensor itself, which stays as it is while others stand in its place."""

    nbytes = 0

    def check(self) -> None:
        """Do nothing: it was not written to."""

    def put_back(self, into: Tensor) -> None:
        """Do nothing: it was not written to."""


def _put_back(held: list[_Held]) -> None:
    """Restore all, the last first; an interrupt waits until that is done."""
    interrupt: KeyboardInterrupt | None = None
    while True:
        try:
            while held:
                held[-1].put_back()
                _wait_for(held[-1:])
                held.pop()
            break
        except KeyboardInterrupt as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt


def _wait_for(held: Sequence[_Held]) -> None:
    """Wait until a GPU has done what it was told to do with these tensors."""
    for device in {one.into.device for one in held}:
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()


@contextmanager
def _writing(tensor: Tensor) -> Iterator[None]:
    """Let a tensor be written to: a leaf, or one made in inference mode."""
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        yield
