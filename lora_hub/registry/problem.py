"""`Problem`: what is wrong somewhere, for checks that go on after the first."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from lora_hub.errors import LoraHubError


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong, where, and what to do."""

    where: str
    message: str
    hint: str | None = None


@contextlib.contextmanager
def noted(problems: list[Problem], where: str) -> Iterator[None]:
    """Turn an error of the block into a problem at its own place, else at `where`."""
    try:
        yield
    except LoraHubError as error:
        problems.append(Problem(error.where or where, error.problem, error.hint))
