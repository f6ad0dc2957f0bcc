"""What can be merged, where it goes, and what is refused by name."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_hub.errors import ComposeError, FitError
from lora_hub.merging.execute import execute
from lora_hub.merging.plan import Part, plan
from lora_hub.tensors.checkpoint import Checkpoint
from tests.unit.merging.sources import base, source

WEIGHT = torch.arange(12.0).reshape(4, 3)
HEAD = torch.full((2, 4), 0.1, dtype=torch.float32)


def merged(folder, out, *parts, **options):
    """Merge sources, or pairs of a source and its weight; return the tensors and report."""
    parts = [Part(*part) if isinstance(part, tuple) else Part(part) for part in parts]
    with Checkpoint.open(folder) as checkpoint:
        made = plan(checkpoint, parts, **options)
        report = execute(made, checkpoint, parts, out)
    found = {}
    for path in sorted(out.glob("*.safetensors")):
        found |= load_file(path)
    return found, report


def low_rank(target, rank, out, inp, **fields):
    torch.manual_seed(3)
    a, b = torch.randn(rank, inp), torch.randn(out, rank)
    vectors = {name: fields[name] for name in ("bias", "magnitude") if name in fields}
    names = {name: name for name in vectors}
    tensors = {"a": a, "b": b} | vectors
    rest = {key: value for key, value in fields.items() if key not in vectors}
    return source(tensors, updates=[(target, "a", "b", rest | names)]), 3 / rank * b @ a


def head(name="score.weight", tensor=HEAD):
    return source({"new": tensor}, replacements=[(name, "modules_to_save", "new", None)])


def with_head(**fields):
    """Return an adapter of a linear layer that brings a head."""
    adapter, _ = low_rank("layer", 1, 4, 3)
    data = {
        name: torch.frombuffer(bytearray(adapter.tensors.read(name)), dtype=torch.float32)
        for name in ("a", "b")
    }
    return source(
        {"a": data["a"].reshape(1, 3), "b": data["b"].reshape(4, 1), "new": HEAD},
        updates=[("layer", "a", "b")],
        replacements=[("score.weight", "modules_to_save", "new", None)],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_replaced_tensor_of_weight_one_keeps_its_bits(tmp_path, dtype):
    torch.manual_seed(0)
    new = torch.randn(4, 3).to(dtype)
    folder = base(tmp_path / "base", {"score.weight": WEIGHT.to(dtype)})

    found, report = merged(folder, tmp_path / "out", head(tensor=new))

    assert torch.equal(found["score.weight"], new)
    (tensor,) = report.changed
    assert (tensor.action, tensor.rounding_error) == ("replace", 0)


def test_weights_of_replaced_tensors_count_from_the_base(tmp_path):
    folder = base(tmp_path / "base", {"score.weight": WEIGHT})
    one, two = head(tensor=WEIGHT + 1), head(tensor=WEIGHT + 10)

    found, _ = merged(folder, tmp_path / "out", (one, 0.5), (two, -0.25))

    assert torch.equal(found["score.weight"], WEIGHT + 0.5 - 2.5)


def test_new_rows_of_one_adapter_and_a_whole_tensor_of_another_add(tmp_path):
    folder = base(tmp_path / "base", {"score.weight": WEIGHT})
    rows = source(
        {"rows": torch.tensor([[9.0, 9, 9], [7, 7, 7]])},
        replacements=[("score.weight", "token_delta", "rows", (3, 0))],
    )

    found, _ = merged(folder, tmp_path / "out", rows, (head(tensor=WEIGHT + 2), 0.5))

    wanted = WEIGHT + 1
    wanted[3] += torch.tensor([9.0, 9, 9]) - WEIGHT[3]
    wanted[0] += torch.tensor([7.0, 7, 7]) - WEIGHT[0]
    assert torch.equal(found["score.weight"], wanted)


def test_an_update_acts_on_what_its_adapter_replaces(tmp_path):
    folder = base(tmp_path / "base", {"layer.weight": WEIGHT})
    scaled = source(
        {"new": WEIGHT + 1, "l": torch.tensor([2.0, 3.0, 4.0, 5.0])},
        scales=[("layer", "rows", "l")],
        replacements=[("layer.weight", "modules_to_save", "new", None)],
    )

    found, _ = merged(folder, tmp_path / "out", scaled)

    wanted = (WEIGHT + 1) * torch.tensor([[2.0], [3.0], [4.0], [5.0]])
    assert torch.equal(found["layer.weight"], wanted)


def test_a_head_the_base_does_not_have_is_added_and_told(tmp_path):
    folder = base(
        tmp_path / "base",
        {"layer.weight": WEIGHT.bfloat16()},
        architectures=["XForCausalLM"],
    )

    found, report = merged(folder, tmp_path / "out", with_head())

    assert torch.equal(found["score.weight"], HEAD)
    assert "1 of them changed, 1 new" in str(report)
    assert "new in model.safetensors: score.weight; config.json still says" in str(report)
    provenance = json.loads((tmp_path / "out" / "lorahub-merge.json").read_text())
    assert provenance["new"] == ["score.weight"]
    # Wide numbers lie at multiples of their width, as readers in place want them.
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert list(file.keys()) == ["layer.weight", "score.weight"]
    with Checkpoint.open(tmp_path / "out") as checkpoint:
        assert checkpoint.tensors["score.weight"].begin % 4 == 0


def test_a_new_head_is_written_in_the_dtype_that_is_asked_for(tmp_path):
    folder = base(tmp_path / "base", {"layer.weight": WEIGHT})

    found, report = merged(folder, tmp_path / "out", with_head(), dtype="bfloat16")

    assert torch.equal(found["score.weight"], HEAD.bfloat16())
    new = next(tensor for tensor in report.changed if tensor.action == "new")
    lost = (HEAD.bfloat16().double() - HEAD.double()).norm() / HEAD.double().norm()
    assert new.rounding_error == pytest.approx(float(lost))


def test_a_new_head_stands_in_the_index(tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    names = {"layer.weight": "model-00001-of-00002.safetensors"}
    names["other.weight"] = "model-00002-of-00002.safetensors"
    for name, file in names.items():
        save_file({name: WEIGHT}, folder / file, {"format": "pt"})
    index = {"metadata": {"total_size": 96, "total_parameters": 24}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    merged(folder, tmp_path / "out", with_head())

    found = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    last = "model-00002-of-00002.safetensors"
    assert found["weight_map"] == names | {"score.weight": last}
    assert found["metadata"] == {"total_size": 128, "total_parameters": 32}
    with Checkpoint.open(tmp_path / "out") as checkpoint:
        assert checkpoint.shard_of("score.weight").path.name == last


@pytest.mark.parametrize("weights", [(0.5,), (1.0, 1.0)])
def test_refuses_to_weigh_a_head_against_none(tmp_path, weights):
    folder = base(tmp_path / "base", {"layer.weight": WEIGHT})

    with pytest.raises(ComposeError, match="from one adapter, with the weight 1") as error:
        merged(folder, tmp_path / "out", *((with_head(), weight) for weight in weights))

    assert error.value.where == "score.weight"


def test_refuses_a_new_head_that_holds_no_numbers(tmp_path):
    folder = base(tmp_path / "base", {"score.weight": WEIGHT})
    spoilt = WEIGHT.clone()
    spoilt[1, 1] = float("nan")

    with pytest.raises(ComposeError, match="not finite in F32"):
        merged(folder, tmp_path / "out", head(tensor=spoilt))


def test_refuses_a_row_that_is_given_twice(tmp_path):
    folder = base(tmp_path / "base", {"score.weight": WEIGHT})
    twice = source(
        {"rows": torch.ones(2, 3)},
        replacements=[("score.weight", "token_delta", "rows", (3, 3))],
    )

    with pytest.raises(ComposeError, match="the row 3 is given twice"):
        merged(folder, tmp_path / "out", twice)


def test_a_bias_goes_into_the_layers_own(tmp_path):
    own = torch.tensor([1.0, 2, 3, 4])
    folder = base(tmp_path / "base", {"layer.weight": WEIGHT, "layer.bias": own})
    adapter, delta = low_rank("layer", 2, 4, 3, bias=torch.tensor([2.0, 4, 6, 8]))

    found, _ = merged(folder, tmp_path / "out", (adapter, 0.5))

    assert torch.equal(found["layer.bias"], own + 0.5 * 1.5 * torch.tensor([2.0, 4, 6, 8]))
    assert (found["layer.weight"] - WEIGHT - delta / 2).abs().max() <= 2e-6


def test_refuses_a_bias_for_a_layer_without_one(tmp_path):
    folder = base(tmp_path / "base", {"layer.weight": WEIGHT})
    adapter, _ = low_rank("layer", 1, 4, 3, bias=torch.ones(4))

    with pytest.raises(FitError, match="has a bias for a layer to which the base") as error:
        merged(folder, tmp_path / "out", adapter)

    assert (error.value.where, error.value.hint) == ("layer", "attach the adapter instead")


def test_factors_on_outputs_scale_the_bias_and_those_on_inputs_do_not(tmp_path):
    tensors = {
        f"{name}.{part}": torch.ones(3, 3) if part == "weight" else torch.ones(3)
        for name in ("one", "two")
        for part in ("weight", "bias")
    }
    adapter = source(
        {"l": torch.tensor([0.5, 1.0, 2.0])},
        scales=[("one", "rows", "l"), ("two", "columns", "l")],
    )

    found, report = merged(base(tmp_path / "base", tensors), tmp_path / "out", adapter)

    assert found["one.weight"].tolist() == [[0.5] * 3, [1.0] * 3, [2.0] * 3]
    assert found["one.bias"].tolist() == [0.5, 1.0, 2.0]
    assert found["two.weight"].tolist() == [[0.5, 1.0, 2.0]] * 3
    assert found["two.bias"].tolist() == [1.0, 1.0, 1.0]
    assert {tensor.name for tensor in report.changed} == {
        "one.weight",
        "one.bias",
        "two.weight",
    }


def test_factors_on_the_channels_of_a_convolution(tmp_path):
    weight = torch.arange(24.0).reshape(2, 3, 2, 2)
    adapter = source(
        {"l": torch.tensor([1.0, 2.0, 3.0]).reshape(1, 3, 1, 1)},
        scales=[("conv", "columns", "l")],
    )

    found, _ = merged(
        base(tmp_path / "base", {"conv.weight": weight}), tmp_path / "out", adapter
    )

    wanted = weight * torch.tensor([1.0, 2.0, 3.0]).reshape(1, 3, 1, 1)
    assert torch.equal(found["conv.weight"], wanted)


@pytest.mark.parametrize("model_type", ["gpt_oss", "granitemoe"])
def test_experts_in_one_tensor_are_merged_as_the_model_stores_them(tmp_path, model_type):
    torch.manual_seed(0)
    experts, rank, out, inp = 2, 3, 5, 4
    a, b = torch.randn(experts * rank, inp), torch.randn(out, rank * experts)
    shape = (experts, inp, out) if model_type == "gpt_oss" else (experts, out, inp)
    weight = torch.randn(shape)
    name = "model.layers.0.mlp.experts.down_proj"
    adapter = source(
        {"a": a, "b": b},
        updates=[(name, "a", "b", {"layer": "experts", "rank": rank})],
    )
    folder = base(tmp_path / "base", {name: weight}, model_type=model_type)

    found, _ = merged(folder, tmp_path / "out", adapter)

    # PEFT: A (experts, rank, in), B (out, rank, experts)
    change = torch.einsum(
        "ore,eri->eoi", b.reshape(out, rank, experts), a.reshape(experts, rank, inp)
    )
    change = change.transpose(1, 2) if model_type == "gpt_oss" else change
    assert (found[name] - weight - change).abs().max() <= 4e-6


def test_a_convolution_with_groups_is_refused(tmp_path):
    a, b = torch.randn(2, 4, 3), torch.randn(6, 1, 1)
    adapter = source({"a": a, "b": b}, updates=[("conv", "a", "b", {"layer": "conv"})])
    folder = base(tmp_path / "base", {"conv.weight": torch.randn(6, 2, 3)})

    with pytest.raises(ComposeError, match="a convolution with 2 groups") as error:
        merged(folder, tmp_path / "out", adapter)

    assert (error.value.where, error.value.hint) == ("conv", "attach the adapter instead")


def test_an_alora_is_refused(tmp_path):
    adapter, _ = low_rank("layer", 1, 4, 3)
    folder = base(tmp_path / "base", {"layer.weight": WEIGHT})
    waiting = source(
        {"new": WEIGHT},
        replacements=[("layer.weight", "bias", "new", None)],
        alora_tokens=(5, 6),
    )

    with pytest.raises(
        ComposeError, match="an aLoRA acts only behind its invocation"
    ) as error:
        merged(folder, tmp_path / "out", adapter, waiting)

    assert error.value.hint == "attach the adapter instead"


def test_dora_on_a_row_of_zeros_is_refused(tmp_path):
    weight = WEIGHT.clone()
    weight[2] = 0
    adapter = source(
        {
            "a": torch.ones(1, 3),
            "b": torch.tensor([[1.0], [1], [0], [1]]),
            "m": torch.ones(4),
        },
        updates=[("layer", "a", "b", {"magnitude": "m"})],
    )

    with pytest.raises(
        FitError, match="row 2 of the weight with the update has the norm 0"
    ):
        merged(base(tmp_path / "base", {"layer.weight": weight}), tmp_path / "out", adapter)
    assert not (tmp_path / "out").exists()


def test_a_quantised_tensor_is_not_replaced(tmp_path):
    folder = base(tmp_path / "base", {"score.weight": WEIGHT.to(torch.float8_e4m3fn)})

    with pytest.raises(FitError, match="is stored as F8_E4M3; sums are formed in"):
        merged(folder, tmp_path / "out", head(tensor=WEIGHT))


def test_the_plan_says_what_every_adapter_does(tmp_path):
    folder = base(
        tmp_path / "base",
        {"layer.weight": WEIGHT, "layer.bias": torch.ones(4), "score.weight": HEAD},
    )
    first, _ = low_rank("layer", 1, 4, 3, bias=torch.ones(4), magnitude=torch.ones(4))
    second = source(
        {"l": torch.ones(4), "head": HEAD, "rows": torch.ones(2, 3)},
        scales=[("layer", "rows", "l")],
        replacements=[
            ("layer.weight", "token_delta", "rows", (0, 2)),
            ("score.weight", "modules_to_save", "head", None),
        ],
    )

    with Checkpoint.open(folder) as checkpoint:
        text = str(plan(checkpoint, [Part(first), Part(second, 0.5)]))

    assert "+ 0.5 × an adapter without a name, 1 targets, 2 new tensors" in text
    assert "layer.weight 4×3 F32 → F32, 2 of 2 adapters (2 new rows, DoRA, scales)" in text
    assert "layer.bias 4 F32 → F32, 2 of 2 adapters (bias)" in text
    assert "score.weight 2×4 F32 → F32, 1 of 2 adapters (new numbers)" in text
    assert "1 changed, 2 replaced, 0.0 MB" in text
