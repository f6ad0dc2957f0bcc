"""The oracle is the dense delta in float64 and its singular values."""

import numpy as np
import pytest

from lora_hub.formats.source import AdapterSource, UpdateSource
from lora_hub.inspect import factors
from lora_hub.tensors.file import TensorFile
from tests.builders import tensor_bytes


def source(pairs, *, alpha=4.0, rank=None, layer="linear"):
    """Return an adapter in memory: target → (b, a) as arrays."""
    tensors, data = {}, {}
    for target, (b, a) in pairs.items():
        for name, array in ((f"{target}.a", a), (f"{target}.b", b)):
            tensors[name] = ("F32" if array.dtype == "f4" else "F64", array.shape)
            data[name] = array.tobytes()
    file = TensorFile.from_bytes(tensor_bytes(tensors, data), where="adapter")
    updates = tuple(
        UpdateSource(
            target,
            rank or a.shape[0],
            alpha,
            "alpha/r",
            file.info(f"{target}.a"),
            file.info(f"{target}.b"),
            layer,
        )
        for target, (b, a) in pairs.items()
    )
    return AdapterSource(updates, file)


def random(seed, out=12, rank=4, inp=9):
    numbers = np.random.default_rng(seed)
    return (
        numbers.normal(size=(out, rank)).astype("f4"),
        numbers.normal(size=(rank, inp)).astype("f4"),
    )


def test_norms_are_those_of_the_dense_deltas():
    pairs = {"x": random(0), "y": random(1, out=5), "z": random(2)}

    figures = factors.figures_of(source(pairs, alpha=8.0))

    for one, (b, a) in zip(figures, pairs.values(), strict=True):
        dense = 2.0 * b.astype("f8") @ a.astype("f8")
        assert one.frobenius == pytest.approx(np.linalg.norm(dense), rel=1e-12)


@pytest.mark.parametrize("used", [1, 2, 3, 4])
def test_used_rank_is_that_of_the_dense_delta(used):
    b, a = random(used)
    mix = np.random.default_rng(9).normal(size=(4, used)) @ np.eye(used, 4)
    b = b.astype("f8") @ mix  # its columns are combinations of `used` others

    (one,) = factors.figures_of(source({"x": (b, a.astype("f8"))}))

    assert one.used_rank == np.linalg.matrix_rank(b @ a) == used


def test_small_directions_count_and_rounding_does_not():
    b, a = np.eye(12, 4), np.eye(4, 9)
    b[1, 1], b[2, 2], b[3, 3] = 1e-3, 1e-5, 1e-9

    (one,) = factors.figures_of(source({"x": (b, a)}))

    assert one.used_rank == 3


def test_zero_and_not_finite_factors_are_told_apart():
    b, a = random(0)
    bad = b.copy()
    bad[0, 0] = np.inf

    zero, infinite, fine = factors.figures_of(
        source({"x": (b * 0, a), "y": (bad, a), "z": (b, a)})
    )

    assert zero == factors.Figures(frobenius=0.0, used_rank=0, is_b_zero=True)
    assert infinite == factors.Figures(frobenius=None, used_rank=0, is_b_zero=False)
    assert fine.used_rank == 4


def test_batches_do_not_change_the_figures(monkeypatch):
    pairs = {f"x{index}": random(index) for index in range(7)}
    whole = factors.figures_of(source(pairs))
    monkeypatch.setattr(factors, "BATCH_BYTES", 2 * 8 * (12 * 4 + 4 * 9))

    assert factors.figures_of(source(pairs)) == whole


def test_experts_count_together_as_peft_lays_them_out():
    numbers = np.random.default_rng(3)
    experts, rank, out, inp = 3, 2, 5, 4
    a = numbers.normal(size=(experts * rank, inp))
    b = numbers.normal(size=(out, rank * experts))
    b[:, experts:] = 0  # the second rank of every expert is unused
    dense = [
        2.0 * b.reshape(out, rank, experts)[:, :, e] @ a.reshape(experts, rank, inp)[e]
        for e in range(experts)
    ]

    (one,) = factors.figures_of(source({"x": (b, a)}, rank=rank, layer="experts"))

    assert one.frobenius == pytest.approx(np.linalg.norm(dense), rel=1e-12)
    assert one.used_rank == 1
    assert not one.is_b_zero


def test_a_grouped_convolution_is_the_composition_of_its_two_layers():
    import torch

    rank, groups = 4, 2
    torch.manual_seed(0)
    a = torch.randn(rank, 6, 3, dtype=torch.float64)
    b = torch.randn(8, rank // groups, 1, dtype=torch.float64)
    # Its weight is what it answers to each input that is one number in one place.
    inputs = torch.eye(18, dtype=torch.float64).reshape(18, 6, 3)
    conv = torch.nn.functional.conv1d
    dense = conv(conv(inputs, a), b, groups=groups).reshape(18, 8)

    (one,) = factors.figures_of(
        source({"x": (b.numpy(), a.numpy())}, alpha=8.0, layer="conv")
    )

    assert one.frobenius == pytest.approx(2.0 * float(dense.norm()), rel=1e-12)
    assert one.used_rank == np.linalg.matrix_rank(dense.numpy())


def test_of_ranks_beyond_the_limit_the_norm_alone_is_told(monkeypatch):
    monkeypatch.setattr(factors, "MAX_RANK", 3)
    b, a = random(0)

    (one,) = factors.figures_of(source({"x": (b, a)}))

    assert one.used_rank is None
    dense = b.astype("f8") @ a.astype("f8")
    assert one.frobenius == pytest.approx(np.linalg.norm(dense), rel=1e-12)


@pytest.mark.parametrize(("out", "inp"), [(1, 1), (3, 5), (5, 3)])
def test_factors_of_more_rank_than_rows_take_no_more_memory_than_they_have(out, inp):
    numbers = np.random.default_rng(0)
    b, a = numbers.normal(size=(out, 50_000)), numbers.normal(size=(50_000, inp))

    (one,) = factors.figures_of(source({"x": (b, a)}, alpha=1.0, rank=50_000))

    assert one.frobenius == pytest.approx(np.linalg.norm(b @ a) / 50_000, rel=1e-12)
    assert one.used_rank is None


def test_used_rank_of_flat_factors_is_that_of_the_dense_delta():
    b, a = random(0, out=3, rank=8, inp=5)

    (one,) = factors.figures_of(source({"x": (b, a)}))

    assert one.used_rank == 3


def test_many_groups_of_a_convolution_take_no_more_memory_than_they_have():
    numbers = np.random.default_rng(0)
    a = numbers.normal(size=(60_000, 2, 1))
    b = numbers.normal(size=(60_000, 1, 1))

    (one,) = factors.figures_of(source({"x": (b, a)}, alpha=60_000.0, layer="conv"))

    assert one.frobenius == pytest.approx(np.linalg.norm(b[..., 0] * a[..., 0]), rel=1e-12)
