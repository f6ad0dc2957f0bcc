"""A tiny base written by the safetensors library, and copies of it gone wrong."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file


def tensors(*, layers: int, hidden: int, seed: int, prefix: str) -> dict[str, torch.Tensor]:
    """Return bf16 weights of a model with q_proj and v_proj in each layer."""
    generator = torch.Generator().manual_seed(seed)

    def weight(*shape: int) -> torch.Tensor:
        # With values that float16 cannot hold, as real weights have.
        spread = 10.0 ** torch.randint(-9, 1, shape, generator=generator)
        return (torch.randn(shape, generator=generator) * spread).bfloat16()

    made = {f"{prefix}embed_tokens.weight": weight(11, hidden)}
    for n in range(layers):
        made[f"{prefix}layers.{n}.self_attn.q_proj.weight"] = weight(hidden, hidden)
        made[f"{prefix}layers.{n}.self_attn.v_proj.weight"] = weight(hidden // 2, hidden)
        made[f"{prefix}layers.{n}.norm.weight"] = weight(hidden)
    return made


@pytest.fixture
def make_base(tmp_path):
    """Return a function that writes a checkpoint folder and returns it."""

    def make(
        name: str,
        *,
        layers: int = 3,
        hidden: int = 8,
        seed: int = 0,
        dtype: torch.dtype = torch.bfloat16,
        shards: int = 1,
        prefix: str = "model.",
        change: tuple[str, ...] = (),
        **config: object,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        made = tensors(layers=layers, hidden=hidden, seed=seed, prefix=prefix)
        made = {key: tensor.to(dtype) for key, tensor in made.items()}
        for key in change:
            made[key].view(-1)[0] += 1
        names = list(made)
        cut = -(-len(names) // shards)
        weight_map = {}
        for n in range(shards):
            part = names[n * cut : (n + 1) * cut]
            file_name = (
                f"part-{shards - n}.safetensors" if shards > 1 else "model.safetensors"
            )
            save_file({key: made[key] for key in part}, folder / file_name)
            weight_map |= dict.fromkeys(part, file_name)
        if shards > 1:
            index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        text = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "num_hidden_layers": layers,
            "hidden_size": hidden,
        }
        (folder / "config.json").write_text(json.dumps(text | config))
        return folder

    return make
