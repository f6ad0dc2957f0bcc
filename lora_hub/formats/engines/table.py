"""What each serving engine reads of PEFT's directory, as rows of a table.

An engine reads some of what PEFT's config says, ignores other keys in silence and rejects
some. A row says which, where that is written, and at which version it was read. What is
not in `cannot` is computed as PEFT does; what an engine ignores is put into the factors
(`one_scaling.py`, `zero_updates.py`) or refused (`refused.py`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class Engine:
    """One engine.

    Attributes:
        name: as `--for` takes it.
        title: in messages.
        read_at: the version whose source was read.
        source: where it says so.
        writes: the dialects it can be given.
        has_one_rank: whether it divides alpha by the rank of the config, which all factors
            must then have; else by the rank of each target's own.
        rank_step: ranks are raised to a multiple of this.
        rank_limits: the values of the flag that limits ranks; empty where any number is.
        rank_flag: its name.
        embeddings: last parts of the embeddings whose updates it applies.
        groups: modules side by side that it fuses: kinds of which it needs all.
        needs_every_layer: whether it drops a kind of module that some layer is without.
        cannot: a name of `refused.FEATURES` → what the engine does with it.
        remarks: what a person should know, a sentence each.
    """

    name: str
    title: str
    read_at: str
    source: str
    cannot: Mapping[str, str]
    writes: tuple[str, ...] = ("peft",)
    has_one_rank: bool = True
    rank_step: int = 1
    rank_limits: tuple[int, ...] = ()
    rank_flag: str = ""
    embeddings: frozenset[str] = frozenset()
    groups: tuple[tuple[str, ...], ...] = ()
    needs_every_layer: bool = False
    remarks: tuple[str, ...] = ()


_REJECTS = "rejects it"
_IGNORES = "ignores it in silence"
_BREAKS = "fails on its names"
_UNSURE = "lays experts out in ways that differ between versions"

VLLM = Engine(
    name="vllm",
    title="vLLM",
    read_at="0.30.0, commit 0306474",
    source="vllm/lora/peft_helper.py, lora/lora_model.py, lora/utils.py, config/lora.py",
    rank_limits=(1, 8, 16, 32, 64, 128, 256, 320, 512),
    rank_flag="--max-lora-rank",
    embeddings=frozenset({"embed_tokens"}),
    cannot={
        "alora": _IGNORES,
        "bias": _REJECTS,
        "components": "serves language models",
        "conv": "has no layer for it",
        "dora": _REJECTS,
        "embedding weights": _BREAKS,
        "experts": _UNSURE,
        "ia3": "reads LoRA alone",
        "lora_bias": _BREAKS,
        "modules_to_save": _REJECTS,
        "token rows": _BREAKS,
        "tied": _IGNORES,
    },
)

SGLANG = Engine(
    name="sglang",
    title="SGLang",
    read_at="commit 0ceb81f",
    source="python/sglang/srt/lora/lora.py, lora_config.py, lora_manager.py, mem_pool.py",
    rank_flag="--max-lora-rank",
    embeddings=frozenset({"embed_tokens"}),
    groups=(("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")),
    cannot={
        "alora": _IGNORES,
        "bias": _IGNORES,
        "components": "serves language models",
        "conv": "has no layer for it",
        "dora": _REJECTS,
        "embedding weights": _IGNORES,
        "experts": _UNSURE,
        "ia3": "reads LoRA alone",
        "lora_bias": _IGNORES,
        "modules_to_save": _IGNORES,
        "token rows": _IGNORES,
        "tied": _IGNORES,
    },
)

LORAX = Engine(
    name="lorax",
    title="LoRAX",
    read_at="commit 1e223be",
    source="server/lorax_server/adapters/lora.py, utils/sgmv.py, utils/adapter.py",
    # Ranks below 8 or between multiples of 16 are raised when loading, and the rank of
    # the config with them: what is loaded after that is scaled by alpha over another rank.
    rank_step=16,
    needs_every_layer=True,
    cannot={
        "alora": _IGNORES,
        "bias": _IGNORES,
        "components": "serves language models",
        "conv": _IGNORES,
        "dora": _IGNORES,
        "embedding": _IGNORES,
        "embedding weights": _IGNORES,
        "experts": _IGNORES,
        "ia3": "reads LoRA alone",
        "lora_bias": _IGNORES,
        "modules_to_save": _IGNORES,
        "token rows": _IGNORES,
        "tied": _IGNORES,
    },
    remarks=("on more than {gpus} GPUs LoRAX raises this rank, and scales some wrongly",),
)

LLAMA_CPP = Engine(
    name="llama.cpp",
    title="llama.cpp",
    read_at="commit 0b03ada",
    source="convert_lora_to_gguf.py",
    writes=("peft", "gguf"),
    has_one_rank=False,
    cannot={
        "bias": _BREAKS,
        "components": "serves language models",
        "conv": _BREAKS,
        "dora": _BREAKS,
        # A tied output takes part in it, in the wrong orientation.
        "embedding": "mixes it up with the output where the two are tied",
        "embedding weights": _BREAKS,
        "experts": _BREAKS,
        "ia3": "reads LoRA alone",
        "lora_bias": _BREAKS,
        "modules_to_save": _BREAKS,
        "token rows": _BREAKS,
        "tied": _IGNORES,
    },
)

# name → engine
ENGINES: Mapping[str, Engine] = MappingProxyType(
    {engine.name: engine for engine in (VLLM, SGLANG, LLAMA_CPP, LORAX)}
)
