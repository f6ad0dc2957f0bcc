"""Numbers of every kind of tensor are looked at, each finding by its rule."""

import json
import struct

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_hub
from lora_hub.formats.source import (
    AdapterSource,
    Replacement,
    ScaleSource,
    UpdateSource,
)
from lora_hub.tensors.file import TensorFile
from lora_hub.validation.missing_parts import check_missing_parts
from lora_hub.validation.weights import check_numbers
from tests.builders import tensor_bytes, tiny_adapter

NAN = struct.pack("<f", float("nan"))
ONE = struct.pack("<f", 1.0)
SHAPES = {"a": (1, 4), "b": (6, 1), "m": (6,), "bias": (6,), "s": (6,), "w": (2, 4)}


def source(data=None, dtypes=None, *, without=(), rows=None):
    """Return an adapter with one tensor of each kind; ones where `data` says nothing."""
    tensors = {
        name: ((dtypes or {}).get(name, "F32"), shape) for name, shape in SHAPES.items()
    }
    filled = {
        name: ONE * (shape[0] * (shape[1] if len(shape) > 1 else 1))
        for name, (dtype, shape) in tensors.items()
        if dtype == "F32"
    }
    file = TensorFile.from_bytes(tensor_bytes(tensors, filled | (data or {})), where="f")
    update = UpdateSource(
        target="q",
        rank=1,
        alpha=1.0,
        rule="alpha/r",
        a=file.info("a"),
        b=file.info("b"),
        magnitude=None if "m" in without else file.info("m"),
        bias=None if "bias" in without else file.info("bias"),
    )
    return AdapterSource(
        updates=() if "q" in without else (update,),
        tensors=file,
        scales=() if "s" in without else (ScaleSource("v", "rows", file.info("s")),),
        replacements=()
        if "w" in without
        else (Replacement("score.weight", "modules_to_save", file.info("w"), rows),),
    )


def rules(source):
    return [one.rule for one in check_numbers(source)]


def test_fine_numbers_give_nothing():
    assert rules(source()) == []


@pytest.mark.parametrize("name", SHAPES)
def test_a_number_that_is_not_finite_is_found_in_every_tensor(name):
    size = 4 * SHAPES[name][0] * (SHAPES[name][1] if len(SHAPES[name]) > 1 else 1)

    (found,) = check_numbers(source({name: NAN + ONE * (size // 4 - 1)}))

    assert found.rule == "LH030"
    assert found.where == f"f: {name}"
    assert found.message.startswith("1 of ")


def test_numbers_that_cannot_be_computed_are_named():
    (found,) = check_numbers(source(dtypes={"w": "F8_E4M3"}, data={"w": b"\1" * 8}))

    assert found.rule == "LH062"
    assert found.severity == "note"
    assert found.message == "numbers of F8_E4M3 are not looked at: w"


def test_integers_are_finite():
    assert rules(source(dtypes={"w": "I64"}, data={"w": b"\1" * 64})) == []


def test_a_weight_of_zeros_in_place_of_the_bases_is_named_and_rows_of_zeros_are_not():
    zeros = {"w": b"\0" * 32}

    (found,) = check_numbers(source(zeros))

    assert found.rule == "LH063"
    assert "score.weight" in found.message
    assert rules(source(zeros, rows=(0, 1))) == []


def test_an_adapter_does_nothing_only_where_nothing_else_acts():
    zero = {"b": b"\0" * 24}

    assert rules(source(zero)) == ["LH032"]
    assert rules(source(zero, without=("w", "m", "bias"))) == ["LH031"]
    assert rules(source(without=("q", "w"))) == ["LH031"]
    assert rules(source({"s": b"\0" * 24}, without=("q", "w"))) == []
    assert rules(source(without=("q",))) == []


def promised(source, **config):
    return [one.message for one in check_missing_parts(config, source, "c")]


def test_what_the_config_announces_and_the_file_lacks_is_named():
    plain = source(without=("w", "m", "bias", "s"))

    assert promised(plain, modules_to_save=["score", "gone"]) == [
        "modules_to_save names score, gone, no tensor is of one of them"
    ]
    assert promised(plain, bias="lora_only") == [
        "bias is 'lora_only', and no bias is in the weights"
    ]
    assert promised(plain, modules_to_save=[], bias="none") == []
    assert promised(source(), modules_to_save=["score", "gone"]) == []
    assert promised(source(), bias="all") == []


@pytest.mark.parametrize("module", ["lm_head", "model.embed_tokens"])
def test_a_whole_embedding_that_the_config_does_not_name_is_told(module, tmp_path):
    folder = tiny_adapter(tmp_path / "adapter")
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    one = next(iter(tensors.values()))
    tensors[f"base_model.model.{module}.weight"] = np.ones((16, 8), one.dtype)
    save_file(tensors, path)

    (found,) = lora_hub.validate(folder)

    assert (found.rule, found.severity) == ("LH066", "note")
    assert f"the weights bring a whole {module}.weight (16×8)" in found.message
    config = json.loads((folder / "adapter_config.json").read_text())
    config["modules_to_save"] = [module]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert lora_hub.validate(folder) == ()


def test_validate_says_so_of_a_folder(tmp_path):
    folder = tiny_adapter(tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["modules_to_save"] = ["score"]
    (folder / "adapter_config.json").write_text(json.dumps(config))

    found = lora_hub.validate(folder)

    assert [one.rule for one in found] == ["LH064"]
