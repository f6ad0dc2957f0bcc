"""LyCORIS' methods, each compared with its formula in float64, written here anew."""

import contextlib
import math
import struct

import hypothesis
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_hub.errors import FormatError, LoraHubError
from tests import adapters
from tests.adapters import CONV, TO_Q
from tests.builders import tensor_bytes

LINEAR = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
KERNEL = "lora_unet_down_blocks_0_resnets_0_conv1"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return adapters.pipeline_base(tmp_path_factory.mktemp("base"))


def file_of(module, shapes, *, alpha=None, dtype="F32", seed=0):
    """Return a file's tensors with random numbers, and the numbers in float64."""
    generator = np.random.default_rng(seed)
    tensors = {f"{module}.{name}": (dtype, shape) for name, shape in shapes.items()}
    data = {
        name: adapters.numbers(generator, int(np.prod(shape)), dtype)
        for name, (_, shape) in tensors.items()
    }
    if alpha is not None:
        tensors[f"{module}.alpha"] = ("F32", ())
        data[f"{module}.alpha"] = struct.pack("<f", alpha)
    values = {
        name: adapters.float64(dtype, shape, data[f"{module}.{name}"])
        for name, shape in shapes.items()
    }
    return {"lora.safetensors": tensor_bytes(tensors, data)}, values


def dense(found, target):
    """Return the delta of the adapter, its kernel in one axis."""
    return adapters.deltas(found)[target]


def close(actual, wanted):
    # The same products in another order: a few roundings of float64.
    np.testing.assert_allclose(actual, wanted.reshape(actual.shape), rtol=0, atol=1e-13)


LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


@pytest.mark.parametrize(("module", "columns"), [(LINEAR, 8), (KERNEL, 72)])
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_loha_is_the_product_number_by_number(module, columns, dtype, base):
    shapes = {name: (8, 3) if name.endswith("_a") else (3, columns) for name in LOHA}
    files, v = file_of(module, shapes, alpha=2.0, dtype=dtype)

    found = adapters.read_back("kohya", files, base=base)

    wanted = (v["hada_w1_a"] @ v["hada_w1_b"]) * (v["hada_w2_a"] @ v["hada_w2_b"])
    (update,) = found.updates
    close(dense(found, update.target), wanted * (2.0 / 3))
    assert update.scaling == 2.0 / 3
    assert update.layer == ("linear" if module == LINEAR else "conv")


LOKR = {
    "both whole": ({"lokr_w1": (2, 2), "lokr_w2": (4, 4)}, None),
    "the second in factors": (
        {"lokr_w1": (4, 4), "lokr_w2_a": (2, 1), "lokr_w2_b": (1, 2)},
        1,
    ),
    "the first in factors": (
        {"lokr_w1_a": (4, 1), "lokr_w1_b": (1, 4), "lokr_w2": (2, 2)},
        1,
    ),
    "both in factors": (
        {
            "lokr_w1_a": (4, 2),
            "lokr_w1_b": (2, 4),
            "lokr_w2_a": (2, 2),
            "lokr_w2_b": (2, 2),
        },
        2,
    ),
}


def of_lokr(v):
    def whole(name):
        return v[name] if name in v else v[f"{name}_a"] @ v[f"{name}_b"]

    return np.kron(whole("lokr_w1"), whole("lokr_w2"))


@pytest.mark.parametrize("case", [case for case in LOKR if case != "both whole"])
def test_lokr_is_the_kronecker_product(case, base):
    shapes, rank = LOKR[case]
    files, v = file_of(LINEAR, shapes, alpha=0.5)

    found = adapters.read_back("kohya", files, base=base)

    close(dense(found, TO_Q), of_lokr(v) * 0.5 / rank)


def test_lokr_of_full_rank_is_refused(base):
    files, _ = file_of(LINEAR, LOKR["both whole"][0], alpha=1.0)

    with pytest.raises(FormatError, match="as high as that of the weight"):
        adapters.read_back("kohya", files, base=base)


@pytest.mark.parametrize("alpha", [None, 7.0])
def test_lokr_of_two_whole_matrices_has_the_scaling_one(alpha, base):
    shapes = {"lokr_w1": (4, 4), "lokr_w2": (2, 2, 3, 3)}
    files, _ = file_of(KERNEL, shapes, alpha=alpha)

    with pytest.raises(FormatError, match="of rank 8, as high"):
        adapters.read_back("kohya", files, base=base)
    shapes = {"lokr_w1": (8, 1), "lokr_w2": (1, 8, 3, 3)}
    files, v = file_of(KERNEL, shapes, alpha=alpha)
    found = adapters.read_back("kohya", files, base=base)
    close(
        dense(found, CONV),
        np.kron(v["lokr_w1"], v["lokr_w2"].reshape(1, 72)),
    )
    assert found.updates[0].scaling == 1.0
    assert found.updates[0].a.shape == (1, 8, 3, 3)


def test_convolution_in_three_factors_is_exact_at_the_square_of_its_rank(base):
    shapes = {
        "lora_down.weight": (3, 8, 1, 1),
        "lora_mid.weight": (3, 3, 3, 3),
        "lora_up.weight": (8, 3, 1, 1),
    }
    files, v = file_of(KERNEL, shapes, alpha=1.5)

    found = adapters.read_back("kohya", files, base=base)

    wanted = np.einsum(
        "op,pqxy,qi->oixy",
        v["lora_up.weight"][:, :, 0, 0],
        v["lora_mid.weight"],
        v["lora_down.weight"][:, :, 0, 0],
    )
    close(dense(found, CONV), wanted * 0.5)
    assert (found.updates[0].rank, found.updates[0].scaling) == (9, 0.5)


def test_magnitude_of_the_outputs_is_dora(base):
    shapes = {
        "lora_down.weight": (2, 8),
        "lora_up.weight": (8, 2),
        "dora_scale": (8, 1),
    }
    files, _ = file_of(LINEAR, shapes, alpha=2.0)

    (update,) = adapters.read_back("kohya", files, base=base).updates

    assert update.magnitude.shape == (8,)
    assert update.scaling == 1.0


@pytest.mark.parametrize("scaling", [2.0, 0.7 / 3, 1.6 / 3**0.5, 1e-300])
def test_scaling_of_computed_factors_is_exact(scaling):
    from lora_hub.formats import factors
    from lora_hub.formats.matrices import zeros

    found = factors.of_scaling("x", scaling, zeros("F32", (9, 4)), zeros("F32", (5, 9)))

    assert found.scaling == scaling
    assert found.rank in (9, 16)
    assert found.b.shape == (5, found.rank)


def plain(**more):
    return {"lora_down.weight": (2, 8), "lora_up.weight": (8, 2), **more}


def loha(**more):
    held = {name: (8, 3) if name.endswith("_a") else (3, 8) for name in LOHA}
    return {**held, **more}


BAD = {
    "a factor alone": ({"hada_w1_a": (8, 2)}, "F32", "has hada_w1_a and not the other"),
    "two methods": (plain(hada_w1_a=(8, 2)), "F32", "and not the other factor"),
    "a magnitude alone": ({"dora_scale": (8, 1)}, "F32", "has dora_scale and not"),
    "a magnitude of inputs": (plain(dora_scale=(1, 8)), "F32", "another method than DoRA"),
    "LoHa in float64": (loha(), "F64", "products of such numbers are not exact"),
    "LoHa of unlike ranks": (loha(hada_w2_b=(2, 8)), "F32", "do not fit together"),
    "LoHa that would be broadcast": (loha(hada_w2_b=(3, 1)), "F32", "do not fit together"),
    "LoHa for another kernel": (
        {name: (8, 3) if name.endswith("_a") else (3, 70) for name in LOHA},
        "F32",
        "70 columns are no kernel of [3, 3]",
    ),
    "LoKr of unlike ranks": (
        {"lokr_w1": (4, 4), "lokr_w2_a": (2, 2), "lokr_w2_b": (1, 2)},
        "F32",
        "do not fit together",
    ),
    "outputs of another layer": (
        {"lora_down.weight": (2, 8), "lora_up.weight": (9, 2)},
        "F32",
        "the factors are for 9 outputs",
    ),
    "three factors of unlike ranks": (
        {
            "lora_down.weight": (2, 8, 1, 1),
            "lora_mid.weight": (2, 1, 3, 3),
            "lora_up.weight": (8, 2, 1, 1),
        },
        "F32",
        "do not fit together",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused_by_name(case, base):
    shapes, dtype, problem = BAD[case]
    is_kernel = "kernel" in case or "three" in case
    files, _ = file_of(KERNEL if is_kernel else LINEAR, shapes, dtype=dtype)

    with pytest.raises(FormatError) as error:
        adapters.read_back("kohya", files, base=base)

    assert problem in error.value.problem


def test_factors_that_would_fill_the_memory_are_refused_before_they_are_made(tmp_path):
    base = tmp_path / "unet"
    base.mkdir()
    (base / "model.safetensors").write_bytes(tensor_bytes({"x.weight": ("F16", (8, 8))}))
    shapes = {
        "hada_w1_a": (8, 40000),
        "hada_w1_b": (40000, 8),
        "hada_w2_a": (8, 40000),
        "hada_w2_b": (40000, 8),
    }
    tensors = {f"lora_unet_x.{name}": ("F32", shape) for name, shape in shapes.items()}

    with pytest.raises(FormatError, match="as low-rank factors this adapter takes"):
        adapters.read_back(
            "kohya", {"lora.safetensors": tensor_bytes(tensors)}, base=tmp_path
        )


NAMES = (*LOHA, "lora_down.weight", "lora_up.weight", "lora_mid.weight", "dora_scale")
LOKR_NAMES = ("lokr_w1", "lokr_w2", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b")
SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 4, 8, 9]), max_size=4).map(tuple)
DTYPES = st.sampled_from(["F32", "F32", "F16", "F64", "F4", "F6_E2M3", "I8", "C64"])


@given(
    module=st.sampled_from([LINEAR, KERNEL]),
    shapes=st.sampled_from([NAMES, LOKR_NAMES]).flatmap(
        lambda names: st.dictionaries(
            st.sampled_from(names), SHAPES, min_size=1, max_size=4
        )
    ),
    dtype=DTYPES,
)
@settings(max_examples=200, deadline=None)
def test_whatever_shapes_are_given_factors_are_read_or_refused(base, module, shapes, dtype):
    bits = {"F4": 4, "F6_E2M3": 6, "I8": 8, "F16": 16, "F32": 32}.get(dtype, 64)
    hypothesis.assume(all(math.prod(shape) * bits % 8 == 0 for shape in shapes.values()))
    tensors = {f"{module}.{name}": (dtype, shape) for name, shape in shapes.items()}
    data = {
        name: bytes(math.prod(shape) * bits // 8) for name, (_, shape) in tensors.items()
    }
    files = {"lora.safetensors": tensor_bytes(tensors, data)}

    with contextlib.suppress(LoraHubError):
        (update,) = adapters.read_back("kohya", files, base=base).updates

        assert update.a.shape[0] == update.b.shape[1] == update.rank
