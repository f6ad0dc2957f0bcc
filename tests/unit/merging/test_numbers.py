"""Blocks of any size against the same formula on the whole matrix, in float64."""

import math
import tempfile
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_hub.merging import numbers
from lora_hub.merging.changes import Change, Exchange, Fate
from lora_hub.merging.planned import Part
from lora_hub.tensors.checkpoint import Checkpoint
from tests.unit.merging.sources import base, source

KINDS = ("plain", "dora", "rows", "columns", "whole", "some rows")


@st.composite
def parts_of(draw):
    """Return a seed, the shape of a matrix, how it is stored, and what parts do to it."""
    kinds = draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=3))
    return (
        draw(st.integers(0, 2**16)),
        (draw(st.integers(1, 6)), draw(st.integers(1, 6))),
        draw(st.booleans()),
        [(kind, draw(st.sampled_from([1.0, 0.5, -2.0]))) for kind in kinds],
        draw(st.integers(1, 40)),
    )


def made(kind, index, weight, matrix, is_transposed):
    """Return a part, its step, and what it makes of the matrix by itself."""
    out, inp = matrix.shape
    stored = matrix.T if is_transposed else matrix
    if kind in ("plain", "dora"):
        a, b = torch.randn(2, inp), torch.randn(out, 2)
        m = torch.rand(out) + 0.5
        extra = {"magnitude": "m"} if kind == "dora" else {}
        adapter = source({"a": a, "b": b, "m": m}, updates=[("x", "a", "b", extra)])
        alone = matrix + 1.5 * b.double() @ a.double()
        if kind == "dora":
            alone = alone * (m.double()[:, None] / alone.norm(dim=1, keepdim=True))
        step = Change(index, adapter.updates[0], is_transposed=is_transposed)
    elif kind in ("rows", "columns"):
        l = torch.randn(out if kind == "rows" else inp)
        adapter = source({"l": l}, scales=[("x", kind, "l")])
        alone = matrix * (l.double()[:, None] if kind == "rows" else l.double())
        step = Change(index, adapter.scales[0], is_transposed=is_transposed)
    else:
        rows = None if kind == "whole" else (len(stored) - 1,)
        new = torch.randn(len(stored) if rows is None else 1, stored.shape[1])
        adapter = source({"n": new}, replacements=[("x.weight", "embedding", "n", rows)])
        alone = stored.clone()
        alone[slice(None) if rows is None else list(rows)] = new.double()
        alone = alone.T if is_transposed else alone
        step = Exchange(index, adapter.replacements[0])
    return Part(adapter, weight), step, alone


@settings(max_examples=60)
@given(parts_of())
def test_blocks_of_any_size_give_the_sum_of_what_each_part_makes_of_the_base(drawn):
    seed, shape, is_transposed, kinds, block = drawn
    torch.manual_seed(seed)
    matrix = torch.randn(shape).double() + 3
    all_made = [
        made(kind, index, weight, matrix, is_transposed)
        for index, (kind, weight) in enumerate(kinds)
    ]
    parts = [part for part, _, _ in all_made]
    steps = [step for _, step, _ in all_made]
    fate = Fate(
        "x.weight",
        "x.weight",
        tuple(step for step in steps if isinstance(step, Exchange)),
        tuple(step for step in steps if isinstance(step, Change)),
    )
    stored = (matrix.T if is_transposed else matrix).contiguous()

    with tempfile.TemporaryDirectory() as folder, BlocksOf(block):
        path = base(Path(folder) / "base", {"x.weight": stored})
        with Checkpoint.open(path) as checkpoint:
            found = [
                piece.start + (0 if piece.change is None else piece.change)
                for piece in numbers.blocks(
                    fate,
                    tuple(stored.shape),
                    "F64",
                    checkpoint,
                    parts,
                    numbers.loader(parts),
                )
            ]

    wanted = matrix + sum(part.weight * (alone - matrix) for part, _, alone in all_made)
    wanted = wanted.T if is_transposed else wanted
    assert len(found) == math.ceil(len(stored) / max(1, block // stored.shape[1]))
    assert (torch.cat(found) - wanted).abs().max() <= 1e-12 * (1 + wanted.abs().max())


class BlocksOf:
    """Blocks of so many elements, for a while."""

    def __init__(self, elements):
        self.elements = elements

    def __enter__(self):
        self.usual, numbers.BLOCK_ELEMENTS = numbers.BLOCK_ELEMENTS, self.elements

    def __exit__(self, *_exception):
        numbers.BLOCK_ELEMENTS = self.usual
