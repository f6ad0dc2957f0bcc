"""The oracle is `FolderBase` over the checkpoint that transformers wrote of the model.

Where tensors are large or laid out oddly, it is hashlib over the bytes that torch gives.
"""

import hashlib

import pytest
import torch
from transformers import AutoModelForCausalLM

from lora_hub.base.folder import FolderBase
from lora_hub.base.view import root_of, struct_of
from lora_hub.errors import InconclusiveError
from lora_hub.runtime.base_view import CHUNK_ELEMENTS, ModelBase
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


def holding(tensor):
    """Return a module that holds the tensor as `weight`."""
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(tensor, requires_grad=False)
    return module


def sha256_of(tensor):
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    return "sha256:" + hashlib.sha256(bytes(flat.numpy())).hexdigest()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(CHUNK_ELEMENTS + 3),
        torch.randn(2, CHUNK_ELEMENTS - 1).bfloat16(),
        torch.randn(6, 5, 4).permute(2, 0, 1),
        torch.randn(700, 1100).T,
        torch.randn(3, CHUNK_ELEMENTS + 1)[:, ::2],
        torch.randn(2 * CHUNK_ELEMENTS + 8)[::2],
        torch.randn(1, 7).expand(5, 7),
        torch.tensor(3.0),
        torch.zeros(0, 4),
        torch.arange(9).int(),
    ],
    ids=lambda tensor: f"{list(tensor.shape)} {list(tensor.stride())}",
)
def test_the_digest_is_that_of_the_bytes_row_by_row(tensor):
    assert ModelBase(holding(tensor)).digest("weight") == sha256_of(tensor)


@pytest.mark.parametrize(
    ("narrow", "to", "wide"),
    [
        (torch.bfloat16, "BF16", torch.float32),
        (torch.bfloat16, "BF16", torch.float64),
        (torch.float16, "F16", torch.float32),
        (torch.float16, "F16", torch.float64),
        (torch.float32, "F32", torch.float64),
    ],
)
def test_every_value_counts_in_a_widened_tensor(narrow, to, wide):
    numbers = torch.randn(2, CHUNK_ELEMENTS - 1).to(narrow)
    numbers[0, :6] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 6e-8])
    widened = numbers.to(wide)

    found = ModelBase(holding(widened)).digest("weight", to)
    widened[-1, -1] = 1 + 2**-30 if wide is torch.float64 else 1 + 2**-20
    changed = ModelBase(holding(widened)).digest("weight", to)

    assert found == sha256_of(numbers)
    assert changed is None


def test_a_tensor_that_is_held_in_another_form_cannot_be_compared():
    """A subclass tells the dtype that it stands for and keeps other bytes."""
    from torch.testing._internal.two_tensor import TwoTensor

    model = holding(torch.zeros(2))
    model.weight = torch.nn.Parameter(TwoTensor(torch.ones(2), torch.ones(2)))

    with pytest.raises(InconclusiveError, match="TwoTensor"):
        ModelBase(model).digest("weight")


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


def test_another_tensor_in_the_same_place_is_hashed_anew():
    """Memory that was given back is soon given out again."""
    memory, known = bytearray(16), {}
    model = holding(torch.frombuffer(memory, dtype=torch.float32))
    before = ModelBase(model, known).digest("weight")
    place = model.weight.data_ptr()

    del model.weight
    memory[:] = bytes(range(16))
    model.weight = torch.nn.Parameter(torch.frombuffer(memory, dtype=torch.float32))
    after = ModelBase(model, known).digest("weight")

    assert model.weight.data_ptr() == place
    assert after == "sha256:" + hashlib.sha256(memory).hexdigest() != before


def test_a_tensor_on_the_meta_device_cannot_be_compared():
    view = ModelBase(tiny_model().to("meta"))

    with pytest.raises(InconclusiveError, match="meta device"):
        view.digest("lm_head.weight")


def test_a_model_without_a_config_says_nothing_of_its_architecture():
    view = ModelBase(torch.nn.Linear(2, 2))

    assert view.config.model_type is None
    assert set(view.tensors) == {"weight", "bias"}
