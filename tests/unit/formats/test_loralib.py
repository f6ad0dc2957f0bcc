"""loralib's names; the formula is `lora_B @ lora_A · lora_alpha / r` of its Linear."""

import numpy as np
import pytest

from lora_hub.errors import FormatError, LossyConversion
from tests import adapters
from tests.adapters import K0, Q0, part, source
from tests.builders import tensor_bytes

PAIR = {f"{Q0}.lora_A": ("F32", (2, 8)), f"{Q0}.lora_B": ("F32", (8, 2))}


def read(tensors, alpha=4.0):
    files = {"lora.safetensors": tensor_bytes(tensors)}
    return adapters.read_back("loralib", files, alpha=alpha)


def test_delta_is_that_of_loralib():
    wanted = part(Q0, rank=3, alpha=5)

    data = adapters.written("loralib", source(wanted))["lora.safetensors"]

    found = adapters.tensors_of(data)
    a, b = (adapters.float64(*found[f"{Q0}.lora_{which}"]) for which in "AB")
    np.testing.assert_array_equal(5 / 3 * (b @ a), adapters.delta(wanted))


def test_alpha_that_the_file_cannot_hold_is_told():
    from lora_hub.formats.loralib import write

    assert "lora_alpha=5.0" in write(source(part(Q0, alpha=5.0))).notes[0]


def test_alpha_is_the_callers():
    assert read(PAIR, alpha=6).updates[0].scaling == 3.0


BAD = [
    (PAIR, None, "keeps no scaling in the file"),
    (PAIR, float("nan"), "alpha is nan"),
    ({**PAIR, "x.bias": ("F32", (8,))}, 4, "is a bias"),
    ({**PAIR, "x.weight": ("F32", (8, 8))}, 4, "no low-rank factor"),
    (
        {"attn.lora_A": ("F32", (4, 8)), "attn.lora_B": ("F32", (16, 2))},
        4,
        "as of a MergedLinear",
    ),
    (
        {"conv1.lora_A": ("F32", (6, 6)), "conv1.lora_B": ("F32", (6, 6))},
        4,
        "a convolution",
    ),
    ({f"{Q0}.lora_A": ("F32", (2, 8))}, 4, "not the other factor"),
]


@pytest.mark.parametrize(("tensors", "alpha", "problem"), BAD)
def test_what_is_not_read_is_refused_by_name(tensors, alpha, problem):
    with pytest.raises(FormatError) as error:
        read(tensors, alpha)

    assert problem in error.value.problem


LOSSES = [
    ([part(Q0, alpha=2), part(K0, alpha=4)], "one alpha for all"),
    ([part(Q0, rank=3, alpha=1.6, rule="alpha/sqrt(r)")], "no alpha over the rank"),
    ([part(Q0, dora=True)], "magnitudes (DoRA)"),
    ([part("conv", layer="conv")], "updates of convolutions"),
]


@pytest.mark.parametrize(("parts", "loss"), LOSSES)
def test_what_loralib_cannot_say_is_refused_with_the_list(parts, loss):
    with pytest.raises(LossyConversion) as error:
        adapters.written("loralib", source(*parts))

    assert loss in error.value.losses[0]


def test_embedding_is_told_by_its_name():
    found = read({"wte.lora_A": ("F32", (2, 9)), "wte.lora_B": ("F32", (8, 2))})

    assert [update.layer for update in found.updates] == ["embedding"]


def merged(a, b, alpha, enabled, rank):
    """Return the delta of a MergedLinear as loralib computes it, group by group."""
    size = len(b) // sum(enabled)
    rows, group = [], 0
    for is_enabled in enabled:
        if is_enabled:
            own = (
                b[group * size : (group + 1) * size] @ a[group * rank : (group + 1) * rank]
            )
            group += 1
        else:
            own = np.zeros((size, a.shape[1]))
        rows.append(alpha / rank * own)
    return np.concatenate(rows)


@pytest.mark.parametrize("enabled", [(True, True, True), (True, False, True)])
def test_merged_layer_is_one_update_with_a_block_for_each_group(enabled):
    groups, rank = sum(enabled), 3
    tensors = {
        "c_attn.lora_A": ("F32", (groups * rank, 8)),
        "c_attn.lora_B": ("F32", (groups * 8, rank)),
    }
    generator = np.random.default_rng(0)
    data = {
        name: adapters.numbers(generator, shape[0] * shape[1], dtype)
        for name, (dtype, shape) in tensors.items()
    }
    files = {"lora.safetensors": tensor_bytes(tensors, data)}

    found = adapters.read_back("loralib", files, alpha=5.0, enable_lora=enabled)

    a, b = (adapters.float64(*tensors[name], data[name]) for name in tensors)
    np.testing.assert_allclose(
        adapters.deltas(found)["c_attn"],
        merged(a, b, 5.0, enabled, rank),
        rtol=1e-14,  # the same products, in another order of scaling
    )
    assert found.updates[0].scaling == 5.0 / rank


@pytest.mark.parametrize(("rank", "size"), [(1, 3), (2, 3), (3, 5), (2, 1)])
def test_convolution_is_that_of_loralib(rank, size, tmp_path):
    shape = (5, 4, size, size)
    base = {"conv1.weight": ("F32", shape)}
    (tmp_path / "model.safetensors").write_bytes(tensor_bytes(base))
    tensors = {
        "conv1.lora_A": ("F32", (rank * size, 4 * size)),
        "conv1.lora_B": ("F32", (5 * size, rank * size)),
    }
    generator = np.random.default_rng(0)
    data = {
        name: adapters.numbers(generator, shape[0] * shape[1], dtype)
        for name, (dtype, shape) in tensors.items()
    }
    files = {"lora.safetensors": tensor_bytes(tensors, data)}

    found = adapters.read_back("loralib", files, alpha=5.0, base=tmp_path)

    a, b = (adapters.float64(*tensors[name], data[name]) for name in tensors)
    np.testing.assert_allclose(
        adapters.deltas(found)["conv1"],
        (b @ a).reshape(5, -1)
        * (5.0 / rank),  # of ConvLoRA.forward, its kernel in one axis
        rtol=1e-14,
    )
    assert found.updates[0].a.shape[1:] == shape[1:]


def test_convolution_in_groups_is_refused(tmp_path):
    base = {"conv1.weight": ("F32", (4, 2, 3, 3))}
    (tmp_path / "model.safetensors").write_bytes(tensor_bytes(base))
    tensors = {"conv1.lora_A": ("F32", (6, 12)), "conv1.lora_B": ("F32", (6, 6))}
    files = {"lora.safetensors": tensor_bytes(tensors)}

    with pytest.raises(FormatError, match="expected a Conv2d of loralib without groups"):
        adapters.read_back("loralib", files, alpha=5.0, base=tmp_path)


MERGED = {"c_attn.lora_A": ("F32", (6, 8)), "c_attn.lora_B": ("F32", (24, 2))}


@pytest.mark.parametrize("shape", [(24, 8), (8, 24)])
def test_base_tells_that_all_groups_are_enabled(shape, tmp_path):
    base = {"c_attn.weight": ("F32", shape)}
    (tmp_path / "model.safetensors").write_bytes(tensor_bytes(base))

    files = {"lora.safetensors": tensor_bytes(MERGED)}
    found = adapters.read_back("loralib", files, alpha=4.0, base=tmp_path)

    assert (found.updates[0].a.shape, found.updates[0].b.shape) == ((6, 8), (24, 6))


def test_groups_that_do_not_fit_are_refused():
    files = {"lora.safetensors": tensor_bytes(MERGED)}

    with pytest.raises(FormatError, match="enable_lora names 1 of 2"):
        adapters.read_back("loralib", files, alpha=4.0, enable_lora=(True, False))
