import json

import pytest

from lora_hub.formats.detect import open_adapter
from lora_hub.public import packaging
from lora_hub.validation.fix import fix_folder, mend_config
from lora_hub.validation.run import validate
from tests import packages
from tests.builders import tiny_adapter, tiny_base


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def test_fixed_config_means_to_peft_what_it_meant(tmp_path):
    from peft import LoraConfig

    folder = tiny_adapter(
        tmp_path / "adapter",
        targets=["q_proj", "v_proj", "o_proj"],
        use_rslora=True,
        rank_pattern={"o_proj": 4},
        alpha_pattern={"layers.1.self_attn.q_proj": 9},
        lora_dropout=0.05,
        fan_in_fan_out=False,
    )
    before = LoraConfig.from_pretrained(folder).to_dict()
    weights = (folder / "adapter_model.safetensors").read_bytes()

    changes = fix_folder(folder)

    assert len(changes) == 1
    assert LoraConfig.from_pretrained(folder).to_dict() == before
    assert set(config_of(folder)) == {
        *("alpha_pattern", "base_model_name_or_path", "inference_mode", "lora_alpha"),
        *("lora_dropout", "peft_type", "peft_version", "r", "rank_pattern"),
        *("target_modules", "task_type", "use_rslora"),
    }
    assert (folder / "adapter_model.safetensors").read_bytes() == weights
    assert len(open_adapter(folder).updates) == 6


def test_fixing_twice_changes_nothing_more(tmp_path):
    folder = tiny_adapter(tmp_path / "adapter")
    fix_folder(folder)
    data = (folder / "adapter_config.json").read_bytes()

    assert fix_folder(folder) == ()
    assert (folder / "adapter_config.json").read_bytes() == data


def test_local_path_of_the_base_goes_and_the_warning_stays(tmp_path):
    folder = tiny_adapter(tmp_path / "adapter", base_name="/home/someone/llama")

    said, _ = fix_folder(folder)

    assert said == (
        f"{folder}/adapter_config.json: removed the base's name, which is a local path"
    )
    assert "someone" not in (folder / "adapter_config.json").read_text()
    assert [one.rule for one in validate(folder)] == ["LH024"]


def test_names_on_hubs_and_revisions_stay(tmp_path):
    config = {"peft_type": "LORA", "base_model_name_or_path": "a/b", "revision": "main"}

    assert mend_config(config) == (config, ())


KEPT = {
    "a value that differs": {"lora_dropout": 0.1},
    "a rank at PEFT's default": {"r": 8},
    "a start that is not the default": {"init_lora_weights": False},
    "what only merging needs": {"fan_in_fan_out": True},
    "a key that is not known and says something": {"novel": 1},
}


@pytest.mark.parametrize("case", KEPT)
def test_what_says_something_stays(case):
    config = {"peft_type": "LORA", **KEPT[case]}

    assert mend_config(config) == (config, ())


def test_packages_are_never_touched(tmp_path):
    packages.package(tmp_path / "p")
    (tmp_path / "p" / "lorahub.json").unlink()  # its signature is left
    before = (tmp_path / "p" / "adapter_config.json").read_bytes()
    packages.package(tmp_path / "q", key=None)

    assert packaging.fix(tmp_path) == ()
    assert (tmp_path / "p" / "adapter_config.json").read_bytes() == before


@pytest.mark.parametrize("data", [b"", b"[1]", b'{"peft_type": "IA3", "r": null}', b"{"])
def test_config_that_is_no_loras_stays_as_it_is(data, tmp_path):
    (tmp_path / "adapter_config.json").write_bytes(data)

    assert fix_folder(tmp_path) == ()
    assert (tmp_path / "adapter_config.json").read_bytes() == data


def test_the_only_weights_get_the_name_that_peft_looks_for(tmp_path):
    folder = tiny_adapter(tmp_path / "adapter")
    weights = folder / "adapter_model.safetensors"
    data = weights.read_bytes()
    weights.rename(folder / "Copy of adapter_model.safetensors")

    said = fix_folder(folder)

    odd = folder / "Copy of adapter_model.safetensors"
    assert said[-1] == f"{odd}: renamed to adapter_model.safetensors"
    assert weights.read_bytes() == data
    assert not odd.exists()
    assert not [each for each in validate(folder) if each.rule == "LH067"]


def test_weights_that_are_no_adapters_keep_their_name(tmp_path):
    folder = tiny_adapter(tmp_path / "adapter")
    (folder / "adapter_model.safetensors").unlink()
    tiny_base(tmp_path / "base")
    (tmp_path / "base/model.safetensors").rename(folder / "model.safetensors")

    fix_folder(folder)

    assert (folder / "model.safetensors").exists()
    assert not (folder / "adapter_model.safetensors").exists()
