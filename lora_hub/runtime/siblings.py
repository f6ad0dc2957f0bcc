"""Which layers of one parent read the same input, by what models call them.

What adds to such layers can read their input once for all of them. A name alone proves
nothing, as in cross-attention, where queries read another input than keys and values:
whoever shares something between siblings looks at the input first.
"""

from collections.abc import Iterable

# Names of layers side by side, in the order their factors are laid out.
SIBLINGS: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),  # Llama, Mistral, Qwen, Gemma, OPT, …
    ("query", "key", "value"),  # BERT, ViT
    ("q_lin", "k_lin", "v_lin"),  # DistilBERT
    ("to_q", "to_k", "to_v"),  # diffusers
    ("q", "k", "v"),  # T5
    ("gate_proj", "up_proj"),
    ("w1", "w3"),  # Llama as Meta names it
    ("wi_0", "wi_1"),  # T5 1.1
)
_GROUP = {name: group for group in SIBLINGS for name in group}


def grouped(targets: Iterable[str]) -> list[tuple[str, ...]]:
    """Return the targets, siblings together, in the order of the first of each group."""
    found: dict[tuple[str, object], list[str]] = {}
    for target in targets:
        parent, _, name = target.rpartition(".")
        found.setdefault((parent, _GROUP.get(name, name)), []).append(target)
    return [tuple(sorted(group, key=_rank)) for group in found.values()]


def _rank(target: str) -> int:
    name = target.rpartition(".")[2]
    group = _GROUP.get(name)
    return group.index(name) if group else 0
