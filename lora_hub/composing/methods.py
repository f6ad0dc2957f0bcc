"""The table of composition methods: name → what it does to one target, and its source.

To add one: write its function in a file beside this, add a row, add a test.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lora_hub.adapter.update import Update
from lora_hub.composing.linear import Term, cat, linear


@dataclass(frozen=True, slots=True)
class Method:
    """How the updates of one target become one update.

    Attributes:
        function: takes at least one term; all have the same shape.
        what: a sentence for people.
        source: where the method comes from.
    """

    function: Callable[[Sequence[Term]], Update]
    what: str
    source: str


METHODS: Mapping[str, Method] = {
    "linear": Method(
        linear,
        "the exact weighted sum of the deltas; equal factors are joined and may cancel",
        "Ilharco et al. 2022, arXiv:2212.04089 (task arithmetic)",
    ),
    "cat": Method(
        cat,
        "the exact weighted sum of the deltas; every adapter keeps its rows, in order",
        "PEFT 0.21.2, add_weighted_adapter, combination_type='cat'",
    ),
}
