"""Small real things for tests: a two-layer base and adapters made for it by PEFT.

Everything is made by the tools users have (transformers, PEFT), so that what our readers
meet in tests is what they meet outside. Each builder fills a folder and returns it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HIDDEN = 16
INTERMEDIATE = 24
LAYERS = 2
VOCABULARY = 32
BASE_NAME = "tiny-lab/tiny-llama"


def tiny_model(
    *, seed: int = 0, layers: int = LAYERS, hidden: int = HIDDEN, dtype: str = "float32"
) -> Any:
    """Return a random LlamaForCausalLM with grouped queries (4 heads, 2 for k, v)."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval().to(getattr(torch, dtype))


def tiny_gpt2() -> Any:
    """Return a random GPT2LMHeadModel, whose layers store their weights as (in, out)."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 32, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)).eval()


def tiny_base(
    folder: Path,
    *,
    seed: int = 0,
    layers: int = LAYERS,
    hidden: int = HIDDEN,
    dtype: str = "float32",
    max_shard_size: str = "5GB",
) -> Path:
    """Save `tiny_model` as a checkpoint folder; `max_shard_size` "4KB" splits it."""
    model = tiny_model(seed=seed, layers=layers, hidden=hidden, dtype=dtype)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def tiny_adapter(
    folder: Path,
    *,
    rank: int = 2,
    alpha: float = 4,
    targets: Sequence[str] | str = ("q_proj", "v_proj"),
    use_rslora: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    base_name: str | None = BASE_NAME,
    seed: int = 1,
    model: Any = None,
    **lora: Any,
) -> Path:
    """Save an adapter for `tiny_base()` with PEFT; both factors are random, none zero.

    `lora` are further fields of PEFT's LoraConfig.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    base = tiny_model() if model is None else model
    torch.manual_seed(seed)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        target_modules=targets if isinstance(targets, str) else list(targets),
        use_rslora=use_rslora,
        rank_pattern=dict(rank_pattern or {}),
        alpha_pattern=dict(alpha_pattern or {}),
        **lora,
    )
    adapted = get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    adapted.peft_config["default"].base_model_name_or_path = base_name
    adapted.save_pretrained(folder, save_embedding_layers=False)  # "auto" asks the network
    (folder / "README.md").unlink(
        missing_ok=True
    )  # PEFT's template, nothing of the author's
    return folder


def logits(model: Any) -> Any:
    """Return the logits of a model for a fixed small batch, as float64."""
    import torch

    tokens = torch.arange(24).reshape(2, 12) % VOCABULARY
    with torch.no_grad():
        return model(tokens).logits.double()


def tiny_manifest(**changes: Any) -> Any:
    """Return a manifest of one module in memory; its digests are of nothing real."""
    import msgspec

    from lora_hub.manifest import document as d

    sha256 = "sha256:" + "0" * 64
    module = d.Module(
        module="model.layers.0.self_attn.q_proj",
        rank=2,
        alpha=4.0,
        scaling="alpha/r",
        dtype="F32",
        a=(2, HIDDEN),
        b=(HIDDEN, 2),
    )
    target = d.BaseTarget(
        module=module.module, shape=(HIDDEN, HIDDEN), dtype="F32", sha256=sha256
    )
    roles = {"adapter_config.json": "config", "adapter_model.safetensors": "weights"}
    manifest = d.Manifest(
        manifest_version=d.MANIFEST_VERSION,
        name="tiny-lab/verse",
        version="1.0.0",
        kind="lora",
        summary="a tiny adapter",
        created="2026-01-01T00:00:00Z",
        license="Apache-2.0",
        base=d.Base(root=sha256, struct=sha256, targets=(target,), config=d.BaseConfig()),
        adapter=d.AdapterInfo(
            format="peft-safetensors",
            modules=(module,),
            summary=d.AdapterSummary(
                max_rank=2,
                ranks=(2,),
                parameters=4 * HIDDEN,
                target_names=("q_proj",),
                layers=1,
            ),
        ),
        task=d.Task(id="text-generation"),
        files=tuple(
            d.File(path=name, role=role, size=0, sha256=sha256)  # type: ignore[arg-type]
            for name, role in roles.items()
        ),
    )
    return msgspec.structs.replace(manifest, **changes)


# name → (dtype, shape), or bytes instead of the shape's zeros
Tensors = Mapping[str, tuple[str, tuple[int, ...]]]


def tensor_bytes(tensors: Tensors, data: Mapping[str, bytes] | None = None) -> bytes:
    """Return a safetensors file with these tensors, zero where `data` says nothing."""
    from lora_hub.tensors.dtypes import BITS
    from lora_hub.tensors.write import chunks_of

    def content(name: str) -> tuple[bytes]:
        dtype, shape = tensors[name]
        size = BITS[dtype] // 8
        for dimension in shape:
            size *= dimension
        return ((data or {}).get(name, b"\0" * size),)

    specs = [(name, dtype, shape) for name, (dtype, shape) in tensors.items()]
    return b"".join(map(bytes, chunks_of(specs, content)))


def tiny_package(folder: Path, *, source: Path | None = None, **fields: Any) -> Path:
    """Pack a tiny adapter against the tiny base; `source` or one of rank 2, unsigned.

    The base and the adapter stay beside the package, as `<name>-base`, `<name>-adapter`.
    """
    from lora_hub.package.pack import plan_package, write_package

    base = folder.with_name(f"{folder.name}-base")
    if not base.exists():
        tiny_base(base)
    plain = {
        "name": "tiny-lab/verse",
        "version": "1.0.0",
        "task": "text-generation/verse",
        "license": "Apache-2.0",
        "created": "2026-01-01T00:00:00Z",
    }
    adapter = source or tiny_adapter(folder.with_name(f"{folder.name}-adapter"))
    write_package(plan_package(adapter, base=base, **plain | fields), folder)
    return folder


def sign_package(folder: Path, private_pem: bytes) -> Path:
    """Write `model.sig` over the files in a package folder as they are now."""
    from lora_hub import digest
    from lora_hub.signing import keys
    from lora_hub.signing.sign import sign

    files = {
        path.name: digest.of_bytes(path.read_bytes())
        for path in folder.iterdir()
        if path.name != "model.sig"
    }
    key = keys.private_key(private_pem, where="key")
    (folder / "model.sig").write_bytes(sign(files, subject=folder.name, key=key))
    return folder
