"""Apply adapters by name to a model in memory, and take them off again.

Usage: python examples/apply_by_name.py
"""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lora_hub

tokenizer = AutoTokenizer.from_pretrained("build/base")
model = AutoModelForCausalLM.from_pretrained("build/base", dtype=torch.float32)


def write(prompt: str = "ROMEO.\nWhat light") -> str:
    inputs = tokenizer(prompt, return_tensors="pt")
    with torch.inference_mode():
        tokens = model.generate(
            **inputs, max_new_tokens=16, do_sample=False, repetition_penalty=1.2
        )
    return tokenizer.decode(tokens[0], skip_special_tokens=True)


host = lora_hub.attach(model, registry="registry")
print(
    host.load("style/shakespeare@~=1.0")
)  # resolved, verified, base checked, N of N targets
print(host.load("style/milton"))

host.use("style/shakespeare")
print(write())

with host.using({"style/shakespeare": 0.5, "style/milton": 0.5}):
    print(write())

host.detach()  # the model is the object it was, bit for bit
