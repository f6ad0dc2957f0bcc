"""The oracle is the safetensors library, which shares no code with ours."""

import math

import pytest
import torch
from safetensors.torch import load_file

from lora_hub.adapter.load import load
from lora_hub.formats.detect import open_adapter
from tests.builders import BASE_NAME, tiny_adapter


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_factors_keep_dtype_and_bits(tmp_path, dtype):
    folder = tiny_adapter(tmp_path / "adapter")
    _cast(folder, dtype)

    adapter = load(open_adapter(folder))

    theirs = load_file(folder / "adapter_model.safetensors")
    for target, update in adapter.updates.items():
        a = theirs[f"base_model.model.{target}.lora_A.weight"]
        b = theirs[f"base_model.model.{target}.lora_B.weight"]
        assert update.a.dtype == update.b.dtype == dtype
        assert torch.equal(update.a, a)
        assert torch.equal(update.b, b)
    assert len(theirs) == 2 * len(adapter.updates)


def test_every_row_has_the_scaling_of_its_target(tmp_path):
    folder = tiny_adapter(
        tmp_path / "adapter",
        rank=2,
        alpha=3,
        use_rslora=True,
        rank_pattern={"v_proj": 3},
        alpha_pattern={"v_proj": 7},
    )

    adapter = load(open_adapter(folder))

    for target, update in adapter.updates.items():
        rank, alpha = (3, 7) if target.endswith("v_proj") else (2, 3)
        assert update.scaling.tolist() == [alpha / math.sqrt(rank)] * rank
        assert update.scaling.dtype == torch.float64


def test_carries_who_it_is(tmp_path):
    source = open_adapter(tiny_adapter(tmp_path / "adapter"))

    adapter = load(source, name="tiny/one", version="1.0.0", digest="sha256:" + "0" * 64)

    assert (adapter.name, adapter.version) == ("tiny/one", "1.0.0")
    assert adapter.digest == "sha256:" + "0" * 64
    assert adapter.base_name == BASE_NAME
    assert adapter.task_type == "CAUSAL_LM"
    assert list(adapter.updates) == sorted(adapter.updates)


def _cast(folder, dtype):
    from safetensors.torch import save_file

    path = folder / "adapter_model.safetensors"
    save_file({name: each.to(dtype) for name, each in load_file(path).items()}, path)
