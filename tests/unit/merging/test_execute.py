"""The oracle is numpy over files that the safetensors library reads: one delta in float64,
one sum in float32, one cast by torch."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lora_hub.adapter.load import load
from lora_hub.errors import ComposeError, StoreError
from lora_hub.formats.detect import open_adapter
from lora_hub.merging import numbers
from lora_hub.merging.execute import execute
from lora_hub.merging.plan import Part, plan
from lora_hub.runtime.host import Host
from lora_hub.tensors.checkpoint import Checkpoint
from tests.builders import logits, tiny_adapter, tiny_base

ONE, TWO = 0.7, -1.3
DIGEST = "sha256:" + "a" * 64


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return {
        "one": tiny_adapter(folder / "one", rank=2, alpha=3, seed=1),
        "two": tiny_adapter(
            folder / "two",
            rank=3,
            alpha=5,
            use_rslora=True,
            targets=("v_proj", "down_proj"),
            seed=2,
        ),
    }


@pytest.fixture
def parts(folders):
    return [
        Part(open_adapter(folders["one"]), ONE, "style/one", "1.0.0", DIGEST),
        Part(open_adapter(folders["two"]), TWO),
    ]


def merged(base, parts, out, *, progress=None, **options):
    with Checkpoint.open(base) as checkpoint:
        made = plan(checkpoint, parts, **options)
        return execute(made, checkpoint, parts, out, progress=progress)


def tensors_of(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def deltas(folders):
    """Return tensor name → Σ wᵢΔᵢ in float64, from the adapters' own files."""
    total = {}
    scalings = {"one": 3 / 2, "two": 5 / math.sqrt(3)}
    for key, weight in (("one", ONE), ("two", TWO)):
        held = load_file(folders[key] / "adapter_model.safetensors")
        for name, b in held.items():
            if ".lora_B." in name:
                a = held[name.replace(".lora_B.", ".lora_A.")].double().numpy()
                change = np.einsum("or,ri->oi", b.double().numpy(), a)
                target = name.removeprefix("base_model.model.").replace(".lora_B", "")
                total[target] = total.get(target, 0) + weight * scalings[key] * change
    return total


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("size", ["5GB", "4KB"])
def test_weights_are_one_sum_and_one_cast_and_the_rest_is_as_it_was(
    folders, parts, tmp_path, dtype, size
):
    base = tiny_base(tmp_path / "base", dtype=dtype, max_shard_size=size)

    report = merged(base, parts, tmp_path / "out")

    before, after, changes = tensors_of(base), tensors_of(tmp_path / "out"), deltas(folders)
    assert before.keys() == after.keys()
    assert {tensor.name for tensor in report.changed} == changes.keys()
    for name, weight in before.items():
        wanted = weight
        if name in changes:
            total = weight.float().numpy() + changes[name].astype(np.float32)
            wanted = torch.from_numpy(total).to(weight.dtype)
        assert after[name].dtype == weight.dtype
        assert torch.equal(after[name], wanted), name


def test_a_base_in_float64_is_summed_in_float64(folders, parts, tmp_path):
    base = tiny_base(tmp_path / "base", dtype="float64")

    merged(base, parts, tmp_path / "out")

    before, after = tensors_of(base), tensors_of(tmp_path / "out")
    for name, change in deltas(folders).items():
        error = np.abs(after[name].numpy() - (before[name].numpy() + change)).max()
        assert error <= 1e-15 * np.abs(change).max()  # two sums of at most five products


def test_blocks_of_rows_make_no_difference(parts, tmp_path, monkeypatch):
    base = tiny_base(tmp_path / "base")
    merged(base, parts, tmp_path / "whole")

    monkeypatch.setattr(numbers, "BLOCK_ELEMENTS", 40)
    merged(base, parts, tmp_path / "blocks")

    whole, blocks = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "blocks")
    assert all(torch.equal(whole[name], blocks[name]) for name in whole)


def test_files_keep_their_names_their_metadata_and_their_bytes(parts, tmp_path):
    base = tiny_base(tmp_path / "base", max_shard_size="4KB")
    (base / "tokenizer.json").write_text("{}")
    out = tmp_path / "out"

    report = merged(base, parts, out)

    names = {path.name for path in base.iterdir()}
    assert {path.name for path in out.iterdir()} == names | {"lorahub-merge.json"}
    assert set(report.files) == names | {"lorahub-merge.json"}
    for name in names:
        if not name.endswith(".safetensors"):
            assert (out / name).read_bytes() == (base / name).read_bytes()
            continue
        with safe_open(base / name, "pt") as theirs, safe_open(out / name, "pt") as ours:
            assert ours.metadata() == theirs.metadata()
            assert ours.keys() == theirs.keys()


def test_the_same_merge_gives_the_same_bytes(parts, tmp_path):
    base = tiny_base(tmp_path / "base", dtype="bfloat16")

    for name in ("one", "two"):
        merged(base, parts, tmp_path / name)

    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_says_by_content_what_it_was_made_of(parts, tmp_path):
    base = tiny_base(tmp_path / "base")

    merged(base, parts, tmp_path / "out", base_root=DIGEST, dtype="float16")

    assert json.loads((tmp_path / "out" / "lorahub-merge.json").read_text()) == {
        "schema": "lorahub.merge/1",
        "base_root": DIGEST,
        "dtype": "float16",
        "adapters": [
            {"name": "style/one", "version": "1.0.0", "digest": DIGEST, "weight": ONE},
            {"weight": TWO},
        ],
    }


def test_a_merge_in_float32_gives_the_logits_of_the_attached_model(
    folders, parts, tmp_path
):
    base = tiny_base(tmp_path / "base", dtype="bfloat16", max_shard_size="4KB")
    out = tmp_path / "out"

    merged(base, parts, out, dtype="float32")

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    host = Host(model)
    for name, folder in folders.items():
        host.load(load(open_adapter(folder)), as_=name)
    host.use({"one": ONE, "two": TWO})
    attached = logits(model)
    plain = AutoModelForCausalLM.from_pretrained(out)
    assert plain.dtype == torch.float32
    assert (logits(plain) - attached).abs().max() <= 2e-6 * attached.abs().max()


def test_another_dtype_is_told_in_config_and_index(parts, tmp_path):
    base = tiny_base(tmp_path / "base", dtype="bfloat16", max_shard_size="4KB")
    out = tmp_path / "out"

    merged(base, parts, out, dtype="float32")

    config = json.loads((out / "config.json").read_text())
    assert config == json.loads((base / "config.json").read_text()) | {"dtype": "float32"}
    index = json.loads((out / "model.safetensors.index.json").read_text())
    theirs = json.loads((base / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2 * theirs["metadata"]["total_size"]
    assert index["weight_map"] == theirs["weight_map"]
    for name, tensor in tensors_of(base).items():
        if "norm" in name:
            assert torch.equal(tensors_of(out)[name], tensor.float())


def test_an_older_config_keeps_its_spelling_of_the_dtype(parts, tmp_path):
    base = tiny_base(tmp_path / "base", dtype="bfloat16")
    config = json.loads((base / "config.json").read_text())
    del config["dtype"]
    inner = {"torch_dtype": "bfloat16"}
    config |= {"torch_dtype": "bfloat16", "text_config": inner}
    (base / "config.json").write_text(json.dumps(config))

    merged(base, parts, tmp_path / "out", dtype="float16")

    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert found["torch_dtype"] == found["text_config"]["torch_dtype"] == "float16"
    assert "dtype" not in found


def test_reports_how_much_of_each_change_rounding_lost(folders, parts, tmp_path):
    base = tiny_base(tmp_path / "base", dtype="bfloat16")

    report = merged(base, parts, tmp_path / "out")

    before, after, changes = tensors_of(base), tensors_of(tmp_path / "out"), deltas(folders)
    for tensor in report.changed:
        kept = (after[tensor.name].double() - before[tensor.name].double()).numpy()
        change = changes[tensor.name]
        lost = np.linalg.norm(kept - change) / np.linalg.norm(change)
        assert tensor.rounding_error == pytest.approx(lost, rel=1e-9)
        assert tensor.dtype == "BF16"
    worst = max(report.changed, key=lambda tensor: tensor.rounding_error)
    assert f"lost at most {worst.rounding_error:.2g} of a change ({worst.name})" in str(
        report
    )


def test_progress_counts_to_the_size_of_the_result(parts, tmp_path):
    base = tiny_base(tmp_path / "base")
    steps = []

    report = merged(
        base, parts, tmp_path / "out", progress=lambda *step: steps.append(step)
    )

    assert steps == sorted(steps)
    assert steps[-1] == (report.size_bytes, report.size_bytes)


def test_refuses_a_folder_that_holds_something(parts, tmp_path):
    base = tiny_base(tmp_path / "base")

    with pytest.raises(StoreError, match="exists already and is not empty"):
        merged(base, parts, base)


@pytest.mark.parametrize("spoil", [float("nan"), 1e30])
def test_refuses_numbers_that_the_result_cannot_hold(parts, folders, tmp_path, spoil):
    folder = shutil.copytree(folders["one"], tmp_path / "spoilt")
    held = load_file(folder / "adapter_model.safetensors")
    next(iter(held.values()))[0, 0] = spoil
    save_file(held, folder / "adapter_model.safetensors", {"format": "pt"})
    base = tiny_base(tmp_path / "base", dtype="float16")

    with pytest.raises(ComposeError, match="not finite in F16") as error:
        merged(base, [Part(open_adapter(folder))], tmp_path / "out")

    assert error.value.where.endswith("q_proj.weight")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".tmp-*"))


def test_refuses_to_cast_numbers_that_are_too_large(parts, tmp_path):
    base = tiny_base(tmp_path / "base")
    held = load_file(base / "model.safetensors")
    held["model.norm.weight"][0] = 1e6
    save_file(held, base / "model.safetensors", {"format": "pt"})

    with pytest.raises(ComposeError, match="not finite in F16") as error:
        merged(base, parts, tmp_path / "out", dtype="float16")

    assert error.value.where == "model.norm.weight"
