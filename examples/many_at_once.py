"""One batch, an adapter of its own for each row; a swap; then in the weights and back.

Usage: python examples/many_at_once.py
"""

import hashlib

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lora_hub

tokenizer = AutoTokenizer.from_pretrained("build/base")
model = AutoModelForCausalLM.from_pretrained("build/base", dtype="auto").eval()


def digest_of_weights() -> str:
    hasher = hashlib.sha256()
    for parameter in model.parameters():
        hasher.update(parameter.detach().view(torch.uint8).numpy())
    return hasher.hexdigest()


# At most 100 MB beside the model; what is not used leaves first, and comes back.
host = lora_hub.attach(model, registry="registry", budget="100MB")
host.load("style/shakespeare")
host.load("style/milton")
print(host.memory)

# Each row has its own: one adapter, none, or a sum.
entries = ["style/shakespeare", None, {"style/shakespeare": 0.5, "style/milton": 0.5}]
batch = tokenizer(["ROMEO.\nWhat light"] * len(entries), return_tensors="pt")
with torch.inference_mode(), host.rows(entries):
    output = model.generate(**batch, max_new_tokens=12, do_sample=False)
for entry, text in zip(entries, tokenizer.batch_decode(output), strict=True):
    print(f"--- {entry or 'the base alone'}\n{text}")

# Put in the weights, it costs nothing to use; then every weight has its bits again.
before = digest_of_weights()
host.use("style/milton")
print(host.merge())
assert digest_of_weights() != before
host.unmerge()
assert digest_of_weights() == before
host.detach()
print("unmerged: every weight has the bits it had")
