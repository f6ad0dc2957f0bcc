"""Attached adapters against PEFT, the reference, on the real base in float32."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_hub.adapter.load import load
from lora_hub.formats.detect import open_adapter
from lora_hub.runtime.host import Host

ROOT = Path(__file__).parents[2]
BASE = ROOT / "build" / "base"
ADAPTERS = ROOT / "tests" / "assets" / "adapters"
TEXT = "ROMEO.\nWhat light through yonder window breaks? Of man's first disobedience"

pytestmark = [pytest.mark.base, pytest.mark.slow]


def base():
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()


@torch.inference_mode()
def logits(model):
    tokens = AutoTokenizer.from_pretrained(BASE)(TEXT, return_tensors="pt")
    return model(**tokens).logits


def peft_logits(names):
    """Return what PEFT gives on a fresh base with these adapters active together."""
    first, *others = names
    model = PeftModel.from_pretrained(base(), ADAPTERS / first, adapter_name=first)
    for name in others:
        model.load_adapter(ADAPTERS / name, adapter_name=name)
    model.base_model.set_adapter(list(names))
    return logits(model.eval())


@pytest.fixture(scope="module")
def attached():
    """Return what the attached model gives for each set of names, and for none."""
    model = base()
    host = Host(model)
    for name in ("shakespeare", "milton"):
        host.load(load(open_adapter(ADAPTERS / name)), as_=name)

    def run(names):
        with host.using(dict.fromkeys(names, 1.0)):
            return logits(model)

    return run


@pytest.mark.parametrize(
    "names", [("shakespeare",), ("milton",), ("shakespeare", "milton")]
)
def test_attached_model_gives_the_logits_of_peft(attached, names):
    ours = attached(names)

    theirs = peft_logits(names)

    difference = float((ours - theirs).abs().max())
    assert difference <= 1e-4
    assert difference <= 1e-5 * float(theirs.abs().max())
    assert float((ours - attached(())).abs().max()) > 1  # and the adapters do something
