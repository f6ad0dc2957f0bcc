"""PiSSA and its like as plain LoRA; the oracle is PEFT's own conversion."""

import json
import shutil

import numpy as np
import peft
import pytest
import safetensors.torch
import torch

from lora_hub.errors import FormatError
from lora_hub.formats.detect import open_adapter
from lora_hub.formats.dialect import ReadOptions
from lora_hub.tensors.arrays import floats
from tests.builders import logits, tiny_model

# PEFT warns of what these methods do to a base; here that is what is looked at.
pytestmark = [
    pytest.mark.filterwarnings("ignore:(PiSSA|OLoRA) changes the base weights"),
    pytest.mark.filterwarnings("ignore:Using Rank-Stabilized LoRA"),
    pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted"),
]

W = "adapter_model.safetensors"
A, B = (f"base_model.model.h.0.q.lora_{which}.weight" for which in "AB")


def trained(folder, kind, **lora):
    """Begin as `kind` does, train a little, save as users do.

    Returns:
        The folders of the adapter, of the initial factors and of PEFT's conversion, and
        the trained model.
    """
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=["q_proj", "v_proj"],
        init_lora_weights=kind,
        **lora,
    )
    model = peft.get_peft_model(tiny_model(), config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(folder / "initial", save_embedding_layers=False)
    model.peft_config["default"].init_lora_weights = kind
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder / "adapter", save_embedding_layers=False)
    if not (config.use_rslora and config.rank_pattern):
        shutil.copytree(folder / "initial", folder / "again")
        model.save_pretrained(
            folder / "converted",
            save_embedding_layers=False,
            path_initial_model_for_weight_conversion=str(folder / "again"),
        )
    return folder / "adapter", folder / "initial", folder / "converted", model


def converted(adapter, initial):
    return open_adapter(adapter, ReadOptions(initial=initial))


@pytest.mark.parametrize("kind", ["pissa", "pissa_niter_4", "olora"])
@pytest.mark.parametrize(
    "lora", [{}, {"use_rslora": True}, {"rank_pattern": {"v_proj": 2}}]
)
def test_factors_are_those_of_pefts_own_conversion(tmp_path, kind, lora):
    adapter, initial, by_peft, _ = trained(tmp_path, kind, **lora)

    source = converted(adapter, initial)

    held = safetensors.torch.load_file(by_peft / W)
    config = json.loads((by_peft / "adapter_config.json").read_text())
    for update in source.updates:
        for which, tensor in (("A", update.a), ("B", update.b)):
            expected = held.pop(f"base_model.model.{update.target}.lora_{which}.weight")
            data = source.tensors.read(tensor.name)
            found = floats(data, tensor.dtype, tensor.shape)
            rank = expected.shape["AB".index(which)]
            np.testing.assert_array_equal(
                found[:rank] if which == "A" else found[:, :rank], expected
            )
        divisor = rank**0.5 if lora.get("use_rslora") else rank
        assert update.scaling == pytest.approx(config["lora_alpha"] / divisor, rel=1e-15)
    assert held == {}


def test_the_plain_base_and_the_result_are_the_trained_model(tmp_path):
    adapter, initial, _, model = trained(tmp_path, "pissa", use_rslora=True)

    source = converted(adapter, initial)

    plain = tiny_model()
    weights = plain.state_dict()
    for update in source.updates:
        a, b = (
            torch.from_numpy(floats(source.tensors.read(t.name), t.dtype, t.shape).copy())
            for t in (update.a, update.b)
        )
        weights[update.weight] += update.scaling * (b.double() @ a.double())
    # The trained model's own base was rounded to float32 when the factors were taken out.
    torch.testing.assert_close(logits(plain), logits(model), rtol=0, atol=2e-6)


def test_a_rank_and_a_rule_that_peft_cannot_convert_are_converted(tmp_path):
    adapter, initial, _, _ = trained(
        tmp_path, "pissa", use_rslora=True, rank_pattern={"v_proj": 2}
    )

    source = converted(adapter, initial)

    scalings = {u.target.rpartition(".")[2]: u.scaling for u in source.updates}
    assert scalings == {"q_proj": 5 / 3**0.5, "v_proj": 5 / 2**0.5}


# ── bits ─────────────────────────────────────────────────────────────────────────────

CONFIG = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["q"],
    "init_lora_weights": "pissa",
}


def folder_of(folder, config=CONFIG, *, seed=0, dtype=torch.float32, rank=2, **tensors):
    generator = torch.Generator().manual_seed(seed)
    held = {
        A: torch.randn(rank, 4, generator=generator).to(dtype),
        B: torch.randn(6, rank, generator=generator).to(dtype),
    } | tensors
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(held, folder / W)
    return folder


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16]
)
def test_every_factor_keeps_its_dtype_and_bits(tmp_path, dtype):
    adapter = folder_of(tmp_path / "now", dtype=dtype)
    initial = folder_of(tmp_path / "then", seed=1, dtype=dtype)
    now, then = (safetensors.torch.load_file(folder / W) for folder in (adapter, initial))

    source = converted(adapter, initial)

    (update,) = source.updates
    a, b = (bytes(source.tensors.read(t.name)) for t in (update.a, update.b))
    assert a == bits(torch.cat([now[A], then[A]]))
    assert b == bits(torch.cat([now[B], -then[B]], dim=1))
    assert (update.rank, update.scaling) == (4, 2.0)


def bits(tensor):
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


# ── refused ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("changes", "tensors", "problem"),
    [
        (
            {"r": 3},
            {"rank": 3},
            "h.0.q: the shapes of the initial factors is [3, 4] and [6",
        ),
        (
            {},
            {"dtype": torch.float16},
            "the dtypes of the initial factors is ('F16', 'F16')",
        ),
        (
            {"lora_alpha": 2},
            {},
            "the scaling of the initial factors is 1.0, of the trained",
        ),
        ({"use_rslora": True}, {}, "the scaling of the initial factors is 2.8284271247461"),
        (
            {"init_lora_weights": "olora"},
            {},
            "init_lora_weights is 'olora', that of the tr",
        ),
        (
            {"target_modules": ["q", "v"]},
            {
                A.replace("q", "v"): torch.ones(2, 4),
                B.replace("q", "v"): torch.ones(6, 2),
            },
            "the initial factors are of other targets: h.0.v",
        ),
        (
            {},
            {B: torch.zeros(6, 2)},
            "h.0.q: an initial factor is zero, as LoRA",
        ),
        ({}, {"seed": 0}, "the initial factors are those of the adapter itself"),
        (
            {"base_model_name_or_path": "org/other"},
            {},
            "the initial factors were made on 'org/other', the adapter's on 'org/base'",
        ),
    ],
)
def test_other_initial_factors_are_refused(tmp_path, changes, tensors, problem):
    named = CONFIG | {"base_model_name_or_path": "org/base"}
    adapter = folder_of(tmp_path / "now", named)
    initial = folder_of(tmp_path / "then", named | changes, **{"seed": 1, **tensors})

    with pytest.raises(FormatError) as error:
        converted(adapter, initial)

    assert problem in error.value.problem
    assert str(initial) in error.value.where


def test_other_starts_have_no_use_for_initial_factors(tmp_path):
    adapter = folder_of(tmp_path / "now", CONFIG | {"init_lora_weights": "gaussian"})
    initial = folder_of(tmp_path / "then", seed=1)

    with pytest.raises(FormatError) as error:
        converted(adapter, initial)

    assert error.value.problem == (
        "init_lora_weights is 'gaussian', which takes nothing out of the base: there is no "
        "use for initial factors"
    )


@pytest.mark.parametrize("start", ["pissa", True])
def test_either_config_may_say_true(tmp_path, start):
    adapter = folder_of(tmp_path / "now", CONFIG | {"init_lora_weights": True})
    initial = folder_of(tmp_path / "then", CONFIG | {"init_lora_weights": start}, seed=1)

    (update,) = converted(adapter, initial).updates

    assert update.rank == 4


def test_dora_cannot_begin_so(tmp_path):
    magnitude = {"base_model.model.h.0.q.lora_magnitude_vector": torch.ones(6)}
    config = CONFIG | {"use_dora": True}
    adapter = folder_of(tmp_path / "now", config, **magnitude)
    initial = folder_of(tmp_path / "then", config, seed=1, **magnitude)

    with pytest.raises(FormatError) as error:
        converted(adapter, initial)

    assert "h.0.q: only plain factors of a linear layer begin so" in error.value.problem


def test_a_folder_without_factors_is_named(tmp_path):
    adapter = folder_of(tmp_path / "now")
    (tmp_path / "then").mkdir()

    with pytest.raises(FormatError) as error:
        converted(adapter, tmp_path / "then")

    assert "there is no adapter_config.json: the initial factors are a folder" in str(
        error.value
    )
