"""An adapter acts on a GPU as it does on the CPU, and leaves the model as it was."""

import hashlib

import pytest
import torch

import lora_hub
from tests.builders import logits, tiny_adapter, tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator here"),
]


def sums(model):
    return {
        name: hashlib.sha256(parameter.detach().cpu().numpy().tobytes()).hexdigest()
        for name, parameter in model.named_parameters()
    }


def test_logits_on_the_gpu_are_those_of_the_cpu(tmp_path):
    folder = tiny_adapter(tmp_path / "adapter", rank=4, alpha=3)
    found = {}
    for device in ("cpu", "cuda"):
        model = tiny_model().to(device)
        host = lora_hub.attach(model)
        host.load(folder, as_="mine")
        with host.using({"mine": 0.7}):
            tokens = (torch.arange(24, device=device).reshape(2, 12)) % 32
            with torch.inference_mode():
                found[device] = model(tokens).logits.double().cpu()

    bare = logits(tiny_model())

    torch.testing.assert_close(found["cuda"], found["cpu"], atol=1e-5, rtol=1e-4)
    assert (found["cpu"] - bare).abs().max() > 0.01


def test_detaching_on_the_gpu_leaves_every_parameter_as_it_was(tmp_path):
    folder = tiny_adapter(tmp_path / "adapter")
    model = tiny_model().to("cuda")
    before = sums(model)

    host = lora_hub.attach(model)
    host.load(folder, as_="mine")
    with host.using("mine"):
        model(torch.arange(8, device="cuda")[None])
    host.detach()

    assert sums(model) == before
