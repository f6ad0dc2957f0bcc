"""The other methods of PEFT: what our factors say is what PEFT's own layers compute.

The oracle is PEFT's `get_delta_weight` in float64, of adapters that PEFT saved. Factors
are products without a sum, so they are compared exactly, by fractions.
"""

import json
from fractions import Fraction

import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import nn

from lora_hub.errors import FormatError
from lora_hub.formats import products
from lora_hub.formats.detect import open_adapter
from lora_hub.formats.dialect import ReadOptions
from lora_hub.formats.peft_types import READERS
from lora_hub.tensors.arrays import floats
from lora_hub.tensors.file import TensorFile
from tests import peft_zoo
from tests.builders import tiny_gpt2, tiny_model

W = "adapter_model.safetensors"
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def saved(folder, config, model, *, spread=0.3):
    """Save an adapter by PEFT with random numbers; return it and PEFT's model."""
    torch.manual_seed(1)
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=spread)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return folder, adapted


def values(source, tensor):
    return floats(source.tensors.read(tensor.name), tensor.dtype, tensor.shape).astype(
        float
    )


def delta(source, update):
    """The change of one target by numpy alone, as PEFT shapes it."""
    a, b = values(source, update.a), values(source, update.b)
    flat = b.reshape(*b.shape[:2]) @ a.reshape(a.shape[0], -1)
    return (update.scaling * flat).reshape(b.shape[0], *a.shape[1:])


def deltas_of_peft(adapted):
    """target → PEFT's change in float64, as (out, in)."""
    adapted.double()
    found = {}
    for name, module in adapted.base_model.model.named_modules():
        if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
            change = module.get_delta_weight("default").detach()
            is_transposed = getattr(module, "fan_in_fan_out", False)
            found[name] = (change.T if is_transposed else change).numpy()
    return found


def assert_same_deltas(source, adapted):
    expected = deltas_of_peft(adapted)
    assert {update.target for update in source.updates} == set(expected)
    for update in source.updates:
        ours, theirs = delta(source, update), expected[update.target]
        # Sums of float64 in another order.
        np.testing.assert_allclose(
            ours.reshape(theirs.shape), theirs, rtol=0, atol=1e-13 * np.abs(theirs).max()
        )


# ── products ─────────────────────────────────────────────────────────────────────────

# Every float32, the smallest too, whose products are no float32.
any_float32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
sides = st.integers(1, 3)


def matrix_of(draw, rows, columns):
    return draw(arrays.arrays(np.float32, (rows, columns), elements=any_float32))


def fractions(array):
    return np.vectorize(Fraction, otypes=[object])(array.astype(float))


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_khatri_rao_is_the_product_number_by_number(data):
    out, inp, r1, r2 = (data.draw(sides) for _ in range(4))
    a1, b1 = matrix_of(data.draw, r1, inp), matrix_of(data.draw, out, r1)
    a2, b2 = matrix_of(data.draw, r2, inp), matrix_of(data.draw, out, r2)

    a, b = products.khatri_rao(a1, b1, a2, b2)

    expected = (fractions(b1) @ fractions(a1)) * (fractions(b2) @ fractions(a2))
    assert (fractions(b) @ fractions(a) == expected).all()


@settings(deadline=None, max_examples=60)
@given(st.data(), st.booleans(), st.booleans())
def test_kronecker_factors_are_the_kronecker_product(data, splits_first, splits_second):
    halves, wholes = [], []
    for splits in (splits_first, splits_second):
        rows, columns, rank = (data.draw(sides) for _ in range(3))
        if splits:
            b, a = matrix_of(data.draw, rows, rank), matrix_of(data.draw, rank, columns)
            halves.append((b, a))
            wholes.append(fractions(b) @ fractions(a))
        else:
            halves.append(matrix_of(data.draw, rows, columns))
            wholes.append(fractions(halves[-1]))

    a, b = products.kronecker_factors(*halves)

    assert (fractions(b) @ fractions(a) == np.kron(*wholes)).all()


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_stored_factors_keep_every_number(data):
    a, b = (
        data.draw(arrays.arrays(np.float64, (2, 2), elements=any_float32)) for _ in "ab"
    )

    stored = products.stored(a, b * b)

    assert stored[0].dtype == stored[1].dtype
    for matrix, expected in zip(stored, (a, b * b), strict=True):
        found = floats(matrix.data, matrix.dtype, matrix.shape)
        np.testing.assert_array_equal(found, expected)


# ── what each method does ────────────────────────────────────────────────────────────


@pytest.mark.parametrize("rank", [1, 2])
def test_loha_is_what_peft_computes(tmp_path, rank):
    config = peft.LoHaConfig(
        r=rank, alpha=3 * rank, target_modules=ALL_LINEAR, alpha_pattern={"v_proj": 0.5}
    )
    folder, adapted = saved(tmp_path, config, tiny_model())

    source = open_adapter(folder)

    assert {update.rank for update in source.updates} == {rank * rank}
    assert_same_deltas(source, adapted)


@pytest.fixture
def convolutions(tmp_path):
    """Return a LoHa of two convolutions, PEFT's model and the folder of the base."""
    net = nn.Sequential(nn.Conv1d(4, 6, 3), nn.Conv2d(6, 8, (3, 2)))
    (tmp_path / "base").mkdir()
    held = {name: tensor.numpy() for name, tensor in net.state_dict().items()}
    safetensors.numpy.save_file(held, tmp_path / "base/model.safetensors")
    config = peft.LoHaConfig(r=2, alpha=3, target_modules=["0", "1"])
    return *saved(tmp_path / "adapter", config, net), tmp_path / "base"


def test_loha_of_convolutions_takes_its_kernels_from_the_base(convolutions):
    folder, adapted, base = convolutions

    source = open_adapter(folder, ReadOptions(base=base))

    for update in source.updates:
        module = adapted.base_model.model[int(update.target)].double()
        assert update.layer == "conv"
        assert update.a.shape[1:] == module.get_base_layer().weight.shape[1:]
        expected = module.get_delta_weight("default").detach().numpy()
        np.testing.assert_allclose(
            delta(source, update).reshape(expected.shape), expected, rtol=1e-12, atol=1e-12
        )


def test_loha_whose_kernels_are_not_the_bases_is_refused(convolutions):
    folder, _, base = convolutions
    net = nn.Sequential(nn.Conv1d(4, 6, 5), nn.Conv2d(6, 8, (3, 2)))
    held = {name: tensor.numpy() for name, tensor in net.state_dict().items()}
    safetensors.numpy.save_file(held, base / "model.safetensors")

    with pytest.raises(FormatError, match="0: has 12 inputs with the kernel, the base 20"):
        open_adapter(folder, ReadOptions(base=base))


@pytest.mark.parametrize(
    "kind",
    [
        {"decompose_both": True, "decompose_factor": 4, "r": 1},
        {"decompose_both": False, "decompose_factor": -1, "r": 1},
        {"decompose_both": False, "decompose_factor": 2, "r": 3, "alpha": 1},
        {"decompose_factor": -1, "r": 64, "alpha": 7},  # both whole
        {"r": 2, "rank_pattern": {"q_proj": 1}, "alpha_pattern": {"mlp.up_proj": 5}},
    ],
)
def test_lokr_is_what_peft_computes(tmp_path, kind):
    config = peft.LoKrConfig(target_modules=ALL_LINEAR, **kind)
    folder, adapted = saved(tmp_path, config, tiny_model())

    source = open_adapter(folder)

    assert_same_deltas(source, adapted)
    for update in source.updates:
        assert update.rank <= min(update.a.shape[1], update.b.shape[0])


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide = nn.Conv2d(4, 8, (3, 2))
        self.narrow = nn.Conv1d(4, 8, 3)


def test_lokr_of_a_whole_kernel_is_a_convolution(tmp_path):
    config = peft.LoKrConfig(target_modules=["wide"], r=64, alpha=32)
    folder, adapted = saved(tmp_path, config, Convolutions())

    source = open_adapter(folder)

    (update,) = source.updates
    assert (update.layer, update.a.shape[2:], update.b.shape[2:]) == (
        "conv",
        (3, 2),
        (1, 1),
    )
    assert_same_deltas(source, adapted)


@pytest.mark.parametrize("config_class", [peft.VeraConfig, peft.PveraConfig])
@pytest.mark.parametrize("targets", [["down_proj"], ["c_attn"]])
def test_vera_is_what_peft_computes(tmp_path, config_class, targets):
    model = tiny_gpt2() if targets == ["c_attn"] else tiny_model()
    config = config_class(r=3, target_modules=targets, fan_in_fan_out="c_attn" in targets)
    folder, adapted = saved(tmp_path, config, model)

    source = open_adapter(folder)

    assert {update.scaling for update in source.updates} == {1.0}
    assert_same_deltas(source, adapted)


@pytest.mark.parametrize(
    ("model", "targets"),
    [(tiny_model, ["q_proj", "v_proj", "down_proj"]), (tiny_gpt2, ["c_proj", "c_attn"])],
)
def test_vera_of_unlike_layers_is_read_by_the_shapes_of_the_base(tmp_path, model, targets):
    fan_in_fan_out = model is tiny_gpt2
    config = peft.VeraConfig(r=3, target_modules=targets, fan_in_fan_out=fan_in_fan_out)
    model().save_pretrained(tmp_path / "base")
    folder, adapted = saved(tmp_path / "adapter", config, model())

    source = open_adapter(folder, ReadOptions(base=tmp_path / "base"))

    assert_same_deltas(source, adapted)


def test_vera_of_unlike_layers_asks_for_the_base(tmp_path):
    config = peft.VeraConfig(r=3, target_modules=["q_proj", "down_proj"])
    folder, _ = saved(tmp_path, config, tiny_model())

    with pytest.raises(FormatError) as error:
        open_adapter(folder)

    assert error.value.problem == (
        "how many inputs down_proj, q_proj have, no file of VeRA says: they share one "
        "projection as large as the largest"
    )
    assert error.value.hint == "name the base with --base: its shapes tell"


@pytest.mark.filterwarnings("ignore:.*have invalid shape")
def test_adalora_is_what_peft_computes(tmp_path):
    config = peft.AdaLoraConfig(
        init_r=4, lora_alpha=3, target_modules=["q_proj", "v_proj"], total_step=10
    )
    torch.manual_seed(1)
    adapted = peft.get_peft_model(tiny_model(), config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    # As the allocator leaves it: masked numbers are zero, and masks stand in the config.
    masks = [
        [True, False, True, True],
        [False] * 4,
        [True] * 4,
        [False, True, False, False],
    ]
    pattern = {}
    layers = [
        (name, module)
        for name, module in adapted.base_model.model.named_modules()
        if hasattr(module, "lora_E")
        and isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer)
    ]
    for (name, module), mask in zip(layers, masks, strict=True):
        pattern[f"{name}.lora_E"] = mask
        module.lora_E["default"].data[~torch.tensor(mask)] = 0
    adapted.peft_config["default"].rank_pattern = pattern
    adapted.save_pretrained(tmp_path, save_embedding_layers=False)

    source = open_adapter(tmp_path)

    given_up = layers[1][0]
    expected = deltas_of_peft(adapted)
    assert not expected.pop(given_up).any()
    assert {update.target for update in source.updates} == set(expected)
    for update in source.updates:
        # PEFT's divisor is a float32 made wide, 2**-24 away from init_r + 1e-5.
        np.testing.assert_allclose(
            delta(source, update), expected[update.target], rtol=3e-7, atol=1e-12
        )


@pytest.mark.parametrize(
    ("model", "targets", "feedforward"),
    [
        (tiny_model, ["k_proj", "v_proj", "down_proj"], ["down_proj"]),
        (tiny_gpt2, ["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
        (tiny_gpt2, ["c_attn", "mlp.c_proj"], r".*mlp\.c_proj"),
    ],
)
def test_ia3_scales_what_peft_scales(tmp_path, model, targets, feedforward):
    config = peft.IA3Config(
        target_modules=targets,
        feedforward_modules=feedforward,
        fan_in_fan_out=model is tiny_gpt2,
    )
    folder, adapted = saved(tmp_path, config, model())
    before = {name: t.double() for name, t in model().state_dict().items()}

    source = open_adapter(folder)
    after = adapted.double().merge_and_unload().state_dict()

    assert source.updates == ()
    changed = {}
    for scale in source.scales:
        vector = values(source, scale.vector).reshape(-1)
        weight = before[scale.weight].numpy()
        is_in_out = model is tiny_gpt2
        along_rows = (scale.axis == "rows") != is_in_out
        changed[scale.weight] = weight * (vector[:, None] if along_rows else vector)
        bias = f"{scale.target}.bias"
        if scale.axis == "rows" and bias in before:
            changed[bias] = before[bias].numpy() * vector
    assert len(source.scales) == len(targets) * 2
    for name, weight in after.items():
        expected = changed.get(name, before[name].numpy())
        np.testing.assert_array_equal(weight.numpy(), expected)


def test_ia3_of_convolutions_goes_by_the_config(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(4, 8, 3), nn.Conv2d(8, 4, 1)

    config = peft.IA3Config(
        target_modules=["first", "second"], feedforward_modules=["second"]
    )
    folder, _ = saved(tmp_path, config, Two())

    source = open_adapter(folder)

    assert [(s.target, s.axis, s.vector.shape) for s in source.scales] == [
        ("first", "rows", (1, 8, 1, 1)),
        ("second", "columns", (1, 8, 1, 1)),
    ]


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_ln_tuning_replaces_normalisation_layers(tmp_path):
    config = peft.LNTuningConfig(target_modules=["ln_1", "ln_f"])
    folder, adapted = saved(tmp_path, config, tiny_gpt2())

    source = open_adapter(folder)
    after = adapted.merge_and_unload().state_dict()

    assert len(source.replacements) == 2 * 3
    for replacement in source.replacements:
        assert (replacement.role, replacement.rows) == ("modules_to_save", None)
        expected = after[replacement.name].numpy()
        np.testing.assert_array_equal(values(source, replacement.tensor), expected)


def test_trainable_tokens_replace_rows(tmp_path):
    config = peft.TrainableTokensConfig(token_indices=[5, 2])
    folder, adapted = saved(tmp_path, config, tiny_model())

    source = open_adapter(folder)
    after = adapted.merge_and_unload().state_dict()

    (replacement,) = source.replacements
    assert (replacement.name, replacement.role, replacement.rows) == (
        "model.embed_tokens.weight",
        "token_delta",
        (5, 2),
    )
    expected = after[replacement.name][[5, 2]].numpy()
    np.testing.assert_array_equal(values(source, replacement.tensor), expected)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_trainable_tokens_of_a_tied_model_are_the_embeddings(tmp_path):
    config = peft.TrainableTokensConfig(token_indices=[5, 2])
    folder, _ = saved(tmp_path, config, peft_zoo.tied_llama())
    held = safetensors.numpy.load_file(folder / W)
    assert any("lm_head" in name for name in held)

    (replacement,) = open_adapter(folder).replacements

    assert replacement.name == "model.embed_tokens.weight"


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_a_tied_head_that_peft_wrapped_twice_is_refused(tmp_path):
    targets = ["embed_tokens", "lm_head"]
    config = peft.TrainableTokensConfig(target_modules=targets, token_indices=[5, 2])
    folder, _ = saved(tmp_path, config, peft_zoo.tied_llama())

    with pytest.raises(FormatError, match=r"the weights hold lm_head\.base_layer"):
        open_adapter(folder)


def test_a_head_with_rows_of_its_own_is_none_of_the_embedding(tmp_path):
    targets = ["embed_tokens", "lm_head"]
    config = peft.TrainableTokensConfig(target_modules=targets, token_indices=[5, 2])
    folder, _ = saved(tmp_path, config, tiny_model())

    replaced = [each.name for each in open_adapter(folder).replacements]

    assert replaced == ["lm_head.weight", "model.embed_tokens.weight"]


def test_rows_of_a_head_that_nothing_names_are_refused(tmp_path):
    config = peft.TrainableTokensConfig(token_indices=[5, 2])
    folder, _ = saved(tmp_path, config, peft_zoo.tied_llama())
    held = safetensors.numpy.load_file(folder / W)
    name = "base_model.model.lm_head.trainable_tokens_delta"
    safetensors.numpy.save_file(held | {name: held[name] + 1}, folder / W)

    with pytest.raises(FormatError, match="the weights hold lm_head"):
        open_adapter(folder)


def test_modules_saved_whole_keep_their_bits(tmp_path):
    config = peft.LoHaConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    folder, adapted = saved(tmp_path, config, tiny_model())

    source = open_adapter(folder)

    (replacement,) = source.replacements
    head = adapted.base_model.model.lm_head.modules_to_save["default"].weight.detach()
    assert (replacement.name, replacement.role) == ("lm_head.weight", "modules_to_save")
    assert source.tensors.read(replacement.tensor.name) == head.numpy().tobytes()


# ── refused ──────────────────────────────────────────────────────────────────────────

Q = "base_model.model.model.layers.0.self_attn.q_proj"


def hada(rank=2, out=8, inp=8, dtype=np.float32, value=1.0):
    pair = {"a": (out, rank), "b": (rank, inp)}
    return {
        f"{Q}.hada_w{which}_{half}": np.full(shape, value, dtype)
        for which in (1, 2)
        for half, shape in pair.items()
    }


LOHA = {"peft_type": "LOHA", "r": 2, "alpha": 4, "target_modules": ["q_proj"]}
LOKR = {**LOHA, "peft_type": "LOKR"}
VERA = {"peft_type": "VERA", "r": 2, "target_modules": ["q_proj"]}
IA3 = {"peft_type": "IA3", "target_modules": ["q_proj"]}
ADALORA = {"peft_type": "ADALORA", "init_r": 2, "target_modules": ["q_proj"]}


def ones(*shape):
    return np.ones(shape, np.float32)


@pytest.mark.parametrize(
    ("config", "tensors", "problem"),
    [
        (LOHA, hada(rank=3), "q_proj: the factors are [8, 3], [3, 8], [8, 3], [3, 8]; exp"),
        (LOHA | {"r": 4}, hada(rank=4), "LoHa of rank 4 has rank 16, above the 8 that 8"),
        (LOHA, hada() | {f"{Q}.hada_t1": ones(2, 2, 3, 3)}, "is decomposed by Tucker"),
        (LOHA, {k: v for k, v in hada().items() if "w2_b" not in k}, "no hada_w2_b beside"),
        (LOHA, hada(dtype=np.float64, value=0.1), "holds numbers that are no float32"),
        (LOHA, hada(dtype=np.int32), "is of I32; expected one of"),
        (LOHA, hada(value=np.nan), "holds a number that is not finite"),
        (LOHA | {"r": 0}, hada(), "r is 0, expected an integer of at least 1"),
        (LOHA | {"alpha": "2"}, hada(), "alpha is '2', expected a number"),
        (
            LOHA | {"alpha_pattern": {"v_proj": 1}},
            hada(),
            "'v_proj' of alpha_pattern match",
        ),
        (LOHA | {"rank_pattern": [1]}, hada(), "rank_pattern is [1], expected an object"),
        (LOHA | {"use_new_thing": 0.5}, hada(), "use_new_thing is 0.5, which is not read"),
        (LOHA | {"target_modules": ["k_proj"]}, hada(), "lists 'k_proj', and the weights"),
        (
            LOHA | {"modules_to_save": "score"},
            hada(),
            "modules_to_save is 'score', expecte",
        ),
        (LOHA | {"task_type": "DREAMING"}, hada(), "task_type is 'DREAMING', expected one"),
        (LOHA, hada() | {"lm_head.weight": ones(2)}, "the tensor 'lm_head.weight' is none"),
        (LOHA, {"x": ones(1)}, "the tensor 'x' is none of LOHA, and modules_to_save does"),
        (LOKR, {f"{Q}.lokr_w1": ones(2, 2)}, "lokr_w2 is told by nothing; expected all or"),
        (
            LOKR,
            {f"{Q}.lokr_w1": ones(2, 2), f"{Q}.lokr_w2": ones(2, 2, 3)},
            "lokr_w2 [2, 2, 3] is a kernel of one axis, of which PEFT makes no Kronecker",
        ),
        (
            LOKR,
            {f"{Q}.lokr_w1": ones(2, 2), f"{Q}.lokr_t2": ones(2, 2, 3, 3)},
            "decomposed by Tucker (lokr_t2)",
        ),
        (
            LOKR,
            {
                f"{Q}.lokr_w1": ones(2, 2),
                f"{Q}.lokr_w2_a": ones(2, 3),
                f"{Q}.lokr_w2_b": ones(3, 2),
            },
            "lokr_w2_a [2, 3], lokr_w2_b [3, 2]; expected two matrices of rank 2",
        ),
        (
            VERA,
            {f"{Q}.vera_lambda_b": ones(4), f"{Q}.vera_lambda_d": ones(2)},
            "the projections (base_model.vera_A, base_model.vera_B) are not in the file",
        ),
        (
            VERA,
            {
                f"{Q}.vera_lambda_b": ones(4),
                f"{Q}.vera_lambda_d": ones(2),
                "base_model.vera_A": ones(3, 4),
                "base_model.vera_B": ones(4, 2),
            },
            "the projections are [3, 4] and [4, 2]; expected [2, in] and [out, 2]",
        ),
        (
            VERA | {"peft_type": "PVERA", "sample_at_inference": True},
            {f"{Q}.pvera_lambda_b": ones(4)},
            "sample_at_inference is true: the change is drawn anew for every input",
        ),
        (VERA | {"bias": "vera_only"}, {}, "bias is 'vera_only', which is not read with"),
        (
            IA3 | {"feedforward_modules": ["q_proj"]},
            {f"{Q}.ia3_l": ones(8, 1)},
            "ia3_l is [8, 1], which scales outputs; by feedforward_modules it scale",
        ),
        (IA3, {f"{Q}.ia3_l": ones(1, 8, 1, 1)}, "null: inputs or outputs may be meant"),
        (IA3, {f"{Q}.ia3_l": ones(8, 2)}, "ia3_l is F32 [8, 2], expected a vector"),
        (
            ADALORA,
            {f"{Q}.lora_A": ones(2, 4), f"{Q}.lora_B": ones(4, 2), f"{Q}.lora_E": ones(2)},
            "lora_A, lora_B and lora_E are [2, 4], [4, 2] and [2]; expected [2, in], [out",
        ),
        (
            {"peft_type": "TRAINABLE_TOKENS", "token_indices": [1, 2]},
            {"base_model.model.wte.trainable_tokens_delta": ones(3, 4)},
            "trainable_tokens_delta is F32 [3, 4]; expected [2, …], a row for each",
        ),
        (
            {"peft_type": "TRAINABLE_TOKENS", "token_indices": [1, 1]},
            {"base_model.model.wte.trainable_tokens_delta": ones(2, 4)},
            "token_indices is [1, 1], expected a list of unlike numbers from 0",
        ),
    ],
)
def test_what_is_not_exact_or_does_not_agree_is_refused(tmp_path, config, tensors, problem):
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / W).write_bytes(safetensors.numpy.save(tensors))

    with pytest.raises(FormatError) as error:
        open_adapter(tmp_path)

    assert problem in error.value.problem
    assert str(tmp_path) in error.value.where


def test_a_small_file_of_huge_products_is_refused_before_they_are_made(tmp_path):
    tensors = {f"{Q}.lokr_w1": ones(1000, 1000), f"{Q}.lokr_w2": ones(1000, 1000)}
    (tmp_path / "adapter_config.json").write_text(json.dumps(LOKR))
    (tmp_path / W).write_bytes(safetensors.numpy.save(tensors))

    with pytest.raises(FormatError) as error:
        open_adapter(tmp_path)

    assert error.value.problem == (
        "as low-rank factors this adapter takes 16000.0 GB, at most 4.3 GB are computed"
    )


def test_a_scaling_that_no_alpha_gives_is_kept_by_rows_of_zeros(tmp_path):
    # 0.1/7 of rank 7 would be 49·(0.1/7) of rank 49: no float64 divided by 49 gives it.
    tensors = hada(rank=7, out=50, inp=50)
    scalings = []
    for alpha in np.arange(1, 60) / 10:
        config = LOHA | {"r": 7, "alpha": float(alpha)}
        file = TensorFile.from_bytes(safetensors.numpy.save(tensors), where="file")
        (update,) = READERS["LOHA"](config, file, "here").updates
        assert update.scaling == alpha / 7
        assert update.rank in (49, 64)
        scalings.append(update.rank)

    assert {49, 64} == set(scalings)
