"""The oracle is `FolderBase` over the checkpoint that transformers wrote of the model."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from lora_hub.base.folder import FolderBase
from lora_hub.base.view import root_of, struct_of
from lora_hub.errors import InconclusiveError
from lora_hub.runtime.base_view import ModelBase
from tests.builders import tiny_base, tiny_model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_model_and_its_folder_are_one_base(tmp_path, dtype):
    path = tiny_base(tmp_path / "base", dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(path)

    with FolderBase.open(path) as folder:
        view = ModelBase(model)

        assert root_of(view) == root_of(folder)
        assert struct_of(view) == struct_of(folder)
        assert view.config == folder.config
        assert dict(view.tensors) == dict(folder.tensors)


def test_a_widened_model_has_the_digests_it_was_widened_from():
    narrow = tiny_model(dtype="bfloat16")
    name = "model.layers.0.self_attn.q_proj.weight"
    wanted = ModelBase(narrow).digest(name)

    wide = ModelBase(narrow.float())

    assert wide.digest(name, "BF16") == wanted
    assert wide.digest(name) != wanted


def test_a_value_that_the_narrower_dtype_does_not_have_is_told():
    wide = tiny_model(dtype="bfloat16").float()
    with torch.no_grad():
        wide.lm_head.weight[0, 0] = 1 + 2**-12

    assert ModelBase(wide).digest("lm_head.weight", "BF16") is None


def test_a_narrower_model_is_not_taken_for_the_wider_one():
    view = ModelBase(tiny_model(dtype="bfloat16"))

    assert view.digest("lm_head.weight", "F32") is None


def test_tied_tensors_stand_once_by_their_first_name():
    model = tiny_model()
    model.lm_head.weight = model.model.embed_tokens.weight

    tensors = ModelBase(model).tensors

    assert "model.embed_tokens.weight" in tensors
    assert "lm_head.weight" not in tensors


def test_known_digests_are_of_the_tensors_as_they_are_now():
    model, known = tiny_model(), {}
    name = "lm_head.weight"
    before = ModelBase(model, known).digest(name)

    again = ModelBase(model, known).digest(name)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    after = ModelBase(model, known).digest(name)

    assert again == before
    assert after != before


def test_a_tensor_on_the_meta_device_cannot_be_compared():
    view = ModelBase(tiny_model().to("meta"))

    with pytest.raises(InconclusiveError, match="meta device"):
        view.digest("lm_head.weight")


def test_a_model_without_a_config_says_nothing_of_its_architecture():
    view = ModelBase(torch.nn.Linear(2, 2))

    assert view.config.model_type is None
    assert set(view.tensors) == {"weight", "bias"}
