"""Configs of every era of PEFT, and every key that PEFT has today."""

import json
from itertools import accumulate

import pytest
from peft import LoraConfig

from lora_hub.errors import FormatError
from lora_hub.formats import peft_config
from lora_hub.formats.peft import read_peft
from lora_hub.tensors.file import TensorFile
from tests.builders import tensor_bytes

# version → keys that came with it, as it saved them where nothing was set. Versions
# between that changed no keys are left out, and so are keys when they were dropped.
ERAS = {
    "0.2.0": {
        "base_model_name_or_path": "a/b",
        "bias": "none",
        "enable_lora": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": 4,
        "lora_dropout": 0.05,
        "merge_weights": False,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 2,
        "target_modules": ["q_proj"],
        "task_type": "CAUSAL_LM",
    },
    "0.3.0": {"init_lora_weights": True},
    "0.4.0": {
        "auto_mapping": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "revision": None,
    },
    "0.6.0": {"alpha_pattern": {}, "rank_pattern": {}},
    "0.7.0": {
        "loftq_config": {},
        "megatron_config": None,
        "megatron_core": "megatron.core",
    },
    "0.8.0": {"use_rslora": False},
    "0.9.0": {"use_dora": False},
    "0.10.0": {"layer_replication": None},
    "0.14.0": {"eva_config": None, "exclude_modules": None, "lora_bias": False},
    "0.15.0": {"corda_config": None, "trainable_token_indices": None},
    "0.16.0": {"qalora_group_size": 16, "use_qalora": False},
    "0.17.0": {"target_parameters": None},
    "0.18.0": {
        "alora_invocation_tokens": None,
        "arrow_config": None,
        "ensure_weight_tying": False,
        "peft_version": "0.18.0",
    },
    "0.21.0": {
        "kasa_config": None,
        "lora_ga_config": None,
        "monteclora_config": None,
        "use_bdlora": None,
        "velora_config": None,
    },
}


def read(config):
    names = {"A": (2, 6), "B": (6, 2)}
    tensors = {
        f"base_model.model.layers.0.q_proj.lora_{which}.weight": ("F32", shape)
        for which, shape in names.items()
    }
    file = TensorFile.from_bytes(tensor_bytes(tensors), where="weights")
    return read_peft(config, file, where="adapter")


@pytest.mark.parametrize(
    "config",
    list(accumulate(ERAS.values(), lambda older, newer: older | newer)),
    ids=list(ERAS),
)
def test_config_of_every_era_is_read(config):
    (update,) = read(config).updates

    assert (update.target, update.scaling) == ("layers.0.q_proj", 2.0)


def test_config_that_peft_saves_today_is_read(tmp_path):
    LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())

    (update,) = read(config).updates

    assert update.scaling == 2.0


def test_the_eras_hold_every_key_of_today():
    known = set().union(*ERAS.values())

    # What a run of PEFT needs for itself is never saved.
    assert {key for key in LoraConfig().to_dict() if key not in known} <= {"runtime_config"}


@pytest.mark.parametrize("value", ["pissa", "PiSSA_niter_16", "olora", "corda", "lora_ga"])
def test_start_that_its_factors_undo_is_refused_with_the_way_out(value):
    config = {**ERAS["0.2.0"], "init_lora_weights": value}

    peft_config.check_config(config, "config")  # the files may say more
    with pytest.raises(FormatError) as error:
        read(config)

    assert "--initial" in error.value.hint


def test_start_that_nothing_undoes_is_refused_at_once():
    config = {**ERAS["0.2.0"], "init_lora_weights": "loftq"}

    with pytest.raises(FormatError) as error:
        peft_config.check_config(config, "config")

    assert "--initial" not in error.value.hint
