import json
import shutil
import subprocess
import sys

import msgspec
import pytest

from lora_hub.errors import ComposeError, FitError, InputError
from lora_hub.formats.detect import open_adapter
from lora_hub.formats.peft import read_peft
from lora_hub.merging.plan import Part, plan
from lora_hub.tensors.checkpoint import Checkpoint
from lora_hub.tensors.file import TensorFile
from tests.builders import tensor_bytes, tiny_adapter, tiny_base

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_base(tmp_path_factory.mktemp("base") / "base", max_shard_size="4KB")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return open_adapter(tiny_adapter(tmp_path_factory.mktemp("adapter") / "adapter"))


def planned(folder, *parts, **options):
    with Checkpoint.open(folder) as base:
        return plan(base, list(parts), **options)


def changed(folder, tmp_path, edit):
    """Return a copy of the folder whose config went through `edit`."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    edit(config)
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def linear_adapter(target, out=32, inp=16):
    """Return an adapter of rank 1 for one target."""
    name = f"base_model.model.{target}"
    data = tensor_bytes(
        {
            f"{name}.lora_A.weight": ("F32", (1, inp)),
            f"{name}.lora_B.weight": ("F32", (out, 1)),
        }
    )
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": [target]}
    return read_peft(config, TensorFile.from_bytes(data, where="x"), where="x")


def test_every_tensor_has_one_fate_and_every_file_its_name(folder, source):
    result = planned(folder, Part(source), Part(source, -0.5, "style/x"))

    fates = {tensor.name: tensor for shard in result.shards for tensor in shard.tensors}
    assert len(result.shards) > 1
    assert [shard.file for shard in result.shards] == sorted(
        path.name for path in folder.glob("*.safetensors")
    )
    for name, fate in fates.items():
        touched = name.endswith(("q_proj.weight", "v_proj.weight"))
        assert fate.action == ("add" if touched else "copy")
        assert fate.parts == ((0, 1) if touched else ())
        assert fate.written == fate.dtype == "F32"


def test_a_dtype_casts_what_is_not_changed(folder, source):
    result = planned(folder, Part(source), dtype="bfloat16")

    fates = [tensor for shard in result.shards for tensor in shard.tensors]
    assert {fate.action for fate in fates} == {"add", "cast"}
    assert {fate.written for fate in fates} == {"BF16"}
    assert result.size_bytes * 2 == planned(folder, Part(source)).size_bytes


def test_other_files_are_copied_and_misleading_ones_left_out(folder, source, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    for name in ("tokenizer.json", "pytorch_model.bin", "README.md", "LICENSE", ".lock"):
        (copy / name).write_text("{}")
    (copy / "adapter_config.json").write_text("{}")
    (copy / "original").mkdir()
    (copy / "vocab.json").symlink_to("nowhere")

    result = planned(copy, Part(source))

    assert result.copied == (
        "LICENSE",
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "tokenizer.json",
    )
    assert result.left_out == (
        "README.md",
        "adapter_config.json",
        "original",
        "pytorch_model.bin",
        "vocab.json",
    )


def test_is_printed_for_people_and_as_json(folder, source):
    result = planned(folder, Part(source, 0.5, "style/x", "1.0.0"))

    text = str(result)
    assert "+ 0.5 × style/x 1.0.0, 4 targets" in text
    assert f"{Q}.weight 16×16 F32 → F32, 1 of 1 adapters" in text
    assert json.loads(msgspec.json.encode(result))["parts"][0]["weight"] == 0.5


def test_is_made_without_torch(folder, tmp_path):
    adapter = tiny_adapter(tmp_path / "adapter")
    program = (
        "import sys; from pathlib import Path\n"
        "from lora_hub.formats.detect import open_adapter\n"
        "from lora_hub.merging.plan import Part, plan\n"
        "from lora_hub.tensors.checkpoint import Checkpoint\n"
        f"with Checkpoint.open(Path({str(folder)!r})) as base:\n"
        f"    print(plan(base, [Part(open_adapter(Path({str(adapter)!r})))]))\n"
        "assert not {'torch', 'numpy', 'safetensors'} & set(sys.modules)\n"
    )

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    assert "4 changed" in done.stdout or "1 changed" in done.stdout


def test_refuses_to_merge_nothing(folder):
    with pytest.raises(ComposeError, match="nothing to merge"):
        planned(folder)


@pytest.mark.parametrize("weight", [float("nan"), float("-inf")])
def test_refuses_weights_that_are_not_finite(folder, source, weight):
    with pytest.raises(ComposeError, match="expected a finite number") as error:
        planned(folder, Part(source), Part(source, weight, "style/x"))

    assert error.value.where == "style/x"


def test_refuses_an_unknown_dtype(folder, source):
    with pytest.raises(InputError, match="'int8' is no dtype to merge to") as error:
        planned(folder, Part(source), dtype="int8")

    assert error.value.hint == "one of bfloat16, float16, float32, float64"


def test_refuses_an_adapter_of_another_shape(folder):
    with pytest.raises(FitError, match="16×16, the adapter's delta is 16×12"):
        planned(folder, Part(linear_adapter(Q, 16, 12)))


def test_refuses_weights_that_are_quantised(tmp_path, source):
    data = tensor_bytes({f"{Q}.weight": ("F8_E4M3", (16, 16)), "scale": ("F32", (1,))})
    (tmp_path / "model.safetensors").write_bytes(data)

    with pytest.raises(FitError, match="is stored as F8_E4M3; sums are formed in") as error:
        planned(tmp_path, Part(linear_adapter(Q, 16, 16)))
    assert "before it was quantised" in error.value.hint


def test_refuses_to_cast_numbers_that_need_their_scales(tmp_path):
    data = tensor_bytes({f"{Q}.weight": ("F32", (16, 16)), "x": ("F8_E4M3", (4,))})
    (tmp_path / "model.safetensors").write_bytes(data)

    with pytest.raises(FitError, match="x is stored as F8_E4M3, whose numbers mean"):
        planned(tmp_path, Part(linear_adapter(Q, 16, 16)), dtype="float32")


@pytest.mark.parametrize("target", ["lm_head", "model.embed_tokens"])
def test_refuses_targets_that_share_one_tensor(folder, tmp_path, target):
    tied = changed(folder, tmp_path, lambda config: config.update(tie_word_embeddings=True))

    with pytest.raises(
        FitError, match="one tensor for its embedding and its head"
    ) as error:
        planned(tied, Part(linear_adapter(target)))

    assert error.value.where == target


@pytest.mark.parametrize("said", [False, None])
def test_merges_into_a_head_that_is_its_own_tensor(folder, tmp_path, said):
    def edit(config):
        config["tie_word_embeddings"] = said
        if said is None:
            del config["tie_word_embeddings"]

    result = planned(changed(folder, tmp_path, edit), Part(linear_adapter("lm_head")))

    added = [
        tensor.name
        for shard in result.shards
        for tensor in shard.tensors
        if tensor.action == "add"
    ]
    assert added == ["lm_head.weight"]
