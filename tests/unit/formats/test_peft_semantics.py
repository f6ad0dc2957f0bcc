"""Adapters saved by PEFT are read whole, and what we write PEFT loads with one effect."""

import pytest
import torch
from safetensors.torch import load_file

from lora_hub.formats import peft, peft_files
from lora_hub.formats.detect import open_adapter
from tests import peft_zoo

# Copies that PEFT saves, and loads as well without.
COPIES = {
    "bias of all": {"classifier.original_module.bias", "classifier.modules_to_save.bias"},
    "biases of a head": {
        f"head.{kind}.{layer}.bias"
        for kind in ("original_module", "modules_to_save.default")
        for layer in (0, 2)
    },
    "tied output": {f"lm_head.lora_{which}.weight" for which in "AB"},
    "tied update": {
        f"lm_head.{what}.weight" for what in ("base_layer", "lora_A", "lora_B")
    },
}


@pytest.fixture(scope="module", params=peft_zoo.CASES)
def saved(request, tmp_path_factory):
    """Return a case's name, its folder and what the adapted model answered."""
    folder = tmp_path_factory.mktemp("saved")
    adapted = peft_zoo.save(peft_zoo.CASES[request.param], folder)
    return request.param, folder, peft_zoo.answer(adapted)


def held(source):
    """Return the name in the file of every tensor that a source names."""
    names = [tensor.name for update in source.updates for tensor in update.tensors]
    return sorted([*names, *(each.tensor.name for each in source.replacements)])


def test_every_tensor_of_a_file_is_in_one_update_or_replacement(saved):
    name, folder, _ = saved
    source = open_adapter(folder)

    names = held(source)

    in_file = set(load_file(folder / peft.WEIGHTS_NAME))
    copies = {f"base_model.model.{copy}" for copy in COPIES.get(name, ())}
    assert len(names) == len(set(names))
    assert set(names) | copies == in_file
    assert not copies & set(names)


def test_peft_answers_the_same_with_what_we_write(saved, tmp_path):
    name, folder, before = saved
    source = open_adapter(folder)

    for file, chunks in peft_files.write(source).files.items():
        (tmp_path / file).write_bytes(b"".join(map(bytes, chunks)))

    after = peft_zoo.answer(peft_zoo.loaded(peft_zoo.CASES[name], tmp_path))
    assert torch.equal(after, before)


def test_what_we_write_is_read_as_the_same(saved, tmp_path):
    _, folder, _ = saved
    source = open_adapter(folder)
    for file, chunks in peft_files.write(source).files.items():
        (tmp_path / file).write_bytes(b"".join(map(bytes, chunks)))

    again = open_adapter(tmp_path)

    assert said(again) == said(source)


def said(source):
    """Return all that a source says; tensors by their bytes, not their names."""

    def content(tensor):
        return tensor and (tensor.dtype, bytes(source.tensors.read(tensor.name)))

    return (
        [
            (
                (u.target, u.layer, u.rank, u.scaling),
                *map(content, (u.a, u.b, u.magnitude, u.bias)),
            )
            for u in source.updates
        ],
        [(r.name, r.role, r.rows, content(r.tensor)) for r in source.replacements],
        (source.alora_tokens, source.ties_weights, source.task_type),
    )


@pytest.mark.parametrize(
    "name", ["experts", "experts and all else", "experts stored transposed"]
)
def test_factors_belong_to_the_parameters_that_peft_gave_them(name, tmp_path):
    adapted = peft_zoo.save(peft_zoo.CASES[name], tmp_path)

    source = open_adapter(tmp_path)

    found = {u.target: u for u in source.updates if u.layer == "experts"}
    wrappers = {
        f"{path.replace('.base_layer', '')}.{module.parameter_name}": module
        for path, module in adapted.get_base_model().named_modules()
        if type(module).__name__ == "ParamWrapper"
    }
    assert found.keys() == wrappers.keys()
    for target, module in wrappers.items():
        a = module.lora_A["default"].weight.detach().numpy()
        assert bytes(source.tensors.read(found[target].a.name)) == a.tobytes()
        assert found[target].experts == module.num_experts
