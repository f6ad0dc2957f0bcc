"""Every error a user can meet, with its exit code and a hint what to do.

This file imports nothing, so that anything may raise from it. The command line
prints `where: problem` and then the hint, in one place (`cli/main.py`).

    LoraHubError                      exit code
    ├─ InputError             2       what was given cannot be read or used
    │   ├─ ReferenceSyntaxError       a name, version or reference is misspelt
    │   ├─ DocumentError              a JSON document is malformed (where = pointer)
    │   ├─ TensorFileError            a safetensors file breaks the format
    │   ├─ FormatError                an adapter directory cannot be understood
    │   ├─ LossyConversion            a dialect cannot say exactly what an adapter does
    │   ├─ ComposeError               adapters cannot be combined as asked
    │   └─ MissingExtra               an optional package is not installed
    ├─ FitError               3       adapter and base do not belong together
    ├─ IntegrityError         4       bytes differ from their digest
    ├─ TrustError             4       signature bad, absent or not allowed
    ├─ NotFoundError          5       nothing has this name, version or digest
    ├─ StoreError             6       a place that keeps bytes does not serve us
    │   └─ AlreadyExists              a published version does not change
    └─ InconclusiveError      7       could not be checked, which is never "fine"

`IntegrityError` and `TrustError` are never retried and never caught on the way up.
"""

from typing import ClassVar


class LoraHubError(Exception):
    """The root of all errors raised by lora_hub.

    Args:
        problem: what was found and what was expected, a sentence in lower case.
        where: the file, tensor, module or JSON pointer it concerns.
        hint: what the reader can do next.
    """

    exit_code: ClassVar[int] = 70

    def __init__(
        self, problem: str, *, where: str | None = None, hint: str | None = None
    ) -> None:
        super().__init__(problem)
        self.problem = problem
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}" if self.where else self.problem


class InputError(LoraHubError):
    """What was given cannot be read or used."""

    exit_code = 2


class ReferenceSyntaxError(InputError):
    """A name, version or reference does not follow the grammar of `refs.py`."""


class DocumentError(InputError):
    """A JSON document is malformed; `where` names the file and the JSON pointer."""


class TensorFileError(InputError):
    """A safetensors file breaks the format or one of our limits."""


class FormatError(InputError):
    """An adapter directory holds something that cannot be applied exactly."""


class LossyConversion(InputError):
    """A dialect cannot say exactly what an adapter does.

    Args:
        losses: everything that could not be said, one sentence each.
    """

    def __init__(
        self,
        problem: str,
        *,
        losses: tuple[str, ...],
        where: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(problem, where=where, hint=hint)
        self.losses = losses


class ComposeError(InputError):
    """Adapters cannot be combined in the way asked for."""


class MissingExtra(InputError):
    """A package that only some features need is not installed."""


class FitError(LoraHubError):
    """Adapter and base do not belong together.

    Args:
        reasons: every reason found, the most telling first.
    """

    exit_code = 3

    def __init__(
        self,
        problem: str,
        *,
        where: str | None = None,
        hint: str | None = None,
        reasons: tuple[str, ...] = (),
    ) -> None:
        super().__init__(problem, where=where, hint=hint)
        self.reasons = reasons


class IntegrityError(LoraHubError):
    """Bytes differ from the digest that names them."""

    exit_code = 4


class TrustError(LoraHubError):
    """A signature is bad, absent, or its key is not allowed to sign this."""

    exit_code = 4


class NotFoundError(LoraHubError):
    """Nothing has this name, version or digest."""

    exit_code = 5


class StoreError(LoraHubError):
    """A place that keeps bytes refuses or fails: permission, space, network."""

    exit_code = 6


class AlreadyExists(StoreError):
    """The version is published with other bytes; published versions do not change."""


class InconclusiveError(LoraHubError):
    """Something could not be checked, which is never the same as being fine."""

    exit_code = 7
