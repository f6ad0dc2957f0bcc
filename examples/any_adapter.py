"""A DoRA adapter with a head of its own, as PEFT saves it: check, pack, attach, merge.

Makes a tiny classifier and its adapter first (random, not trained); needs peft.

Usage: python examples/any_adapter.py [OUT]          (default: build/example/any)
"""

import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification

import lora_hub
from lora_hub.public.packaging import fix

out = Path(sys.argv[1] if len(sys.argv) > 1 else "build/example/any")

# A base in its folder, and what PEFT's save_pretrained leaves after a training.
sizes = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 100}
layers = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_labels": 3}
BertForSequenceClassification(BertConfig(**sizes, **layers)).save_pretrained(out / "base")
base = BertForSequenceClassification.from_pretrained(out / "base")
lora = LoraConfig(task_type="SEQ_CLS", use_dora=True, target_modules=["query", "value"])
trained = get_peft_model(base, lora).eval()
with torch.no_grad():
    for parameter in trained.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter) * 0.1)
trained.save_pretrained(out / "adapter")

# What is wrong with it? Its config names the base by a path on this machine, which goes;
# what stays is a warning that no base is named.
for change in fix(out / "adapter"):
    print(change)
for each in lora_hub.validate(out / "adapter"):
    print(f"{each.severity} {each.rule}: {each.message}")

# A package knows its base by content, and lists the head as a tensor of its own.
lora_hub.pack(
    out / "adapter",
    name="me/sentiment",
    version="1.0.0",
    base=out / "base",
    task="text-classification",
    license="Apache-2.0",
    out=out / "package",
)

# Attached and merged, it answers as it does in PEFT.
tokens = torch.arange(2 * 12).reshape(2, 12)
with torch.no_grad():
    expected = trained(tokens).logits
    model = BertForSequenceClassification.from_pretrained(out / "base").eval()
    host = lora_hub.attach(model)
    print(host.load(out / "package"))
    host.use("me/sentiment")
    attached = model(tokens).logits
    lora_hub.merge(out / "base", [(out / "package", 1.0)], out / "merged")
    merged = BertForSequenceClassification.from_pretrained(out / "merged").eval()
    torch.testing.assert_close(attached, expected)
    torch.testing.assert_close(merged(tokens).logits, expected)
print("attached and merged as in PEFT")
