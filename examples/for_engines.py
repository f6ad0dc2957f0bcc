"""An rsLoRA with a scaling of its own for some targets, said so that vLLM computes it.

vLLM takes one alpha for all targets and ignores alpha_pattern. Makes a tiny adapter first
(random, not trained); needs peft.

Usage: python examples/for_engines.py [OUT]          (default: build/example/engines)
"""

import json
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from lora_hub.errors import LossyConversion
from lora_hub.public.converting import convert

out = Path(sys.argv[1] if len(sys.argv) > 1 else "build/example/engines")


def save(name: str, **options: object) -> Path:
    """Save an adapter with PEFT and return its folder."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 100}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 4}
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **options)
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(**sizes, **layers)), lora)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    model.save_pretrained(out / name)
    return out / name


unlike = save("unlike", use_rslora=True, lora_alpha=8, alpha_pattern={"v_proj": 16})
done = convert(unlike, "peft", out / "for-vllm", for_="vllm")
for note in done.notes:
    print(note)
config = json.loads((out / "for-vllm" / "adapter_config.json").read_text())
print(f"one alpha, {config['lora_alpha']}, for {done.targets} targets")

# What no factor can say, vLLM would reject or ignore. It is refused before that.
try:
    convert(save("dora", use_dora=True), "peft", out / "dora-for-vllm", for_="vllm")
except LossyConversion as error:
    print(f"refused: {error.problem}")
