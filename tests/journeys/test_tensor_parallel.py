"""Adapters on a model that is spread over two processes: as on the model in one piece.

Two processes are started once; each holds both models, compares what they answer, in
float64, and writes the largest differences down. What is compared is told by `CASES`.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lora_hub.adapter.adapter import Adapter
from lora_hub.adapter.update import Update
from lora_hub.runtime.host import Host

PROCESSES = 2

# Each process imports what the test has, and both do everything twice.
pytestmark = pytest.mark.slow
IDS = torch.arange(14).reshape(2, 7) % 33
F64 = torch.float64


def llama(dtype: torch.dtype = F64) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    # Neither 33 nor 38 / 2 = 19 nor 7 tokens is a multiple of what one would like.
    config = LlamaConfig(
        vocab_size=33,
        hidden_size=16,
        intermediate_size=38,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def adapter(model: nn.Module, name: str, seed: int, rank: int, kind: str = "") -> Adapter:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=F64) * 0.3

    updates = {}
    for path, module in model.named_modules():
        is_embedding = isinstance(module, nn.Embedding)
        if not isinstance(module, nn.Linear) and (not is_embedding or kind == "tokens"):
            continue
        first, last = module.weight.shape
        out, inp = (last, first) if is_embedding else (first, last)
        fields: dict[str, Any] = {}
        if kind == "dora":
            fields["magnitude"] = random(out).abs() + 1
        elif kind == "scaled":
            fields["p"] = random(out)
            if not is_embedding:
                fields |= {"bias": random(out), "bias_scale": random(out)}
        updates[path] = Update(
            a=random(rank, inp),
            b=random(out, rank),
            scaling=torch.full((rank,), 0.5, dtype=F64),
            layer="embedding" if is_embedding else "linear",
            **fields,
        )
    tokens = (4, 5) if kind == "tokens" else ()
    return Adapter(name=name, updates=updates, alora_tokens=tokens)


def whole(tensor: Any) -> torch.Tensor:
    full = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()


def answers(model: Any) -> dict[str, torch.Tensor]:
    """Return what the model answers with adapters used in each way."""
    host, one_piece = Host(model), llama()
    for given in (
        adapter(one_piece, "lora", 1, 3),
        adapter(one_piece, "dora", 2, 5, "dora"),
        adapter(one_piece, "scaled", 3, 2, "scaled"),
        adapter(one_piece, "tokens", 4, 2, "tokens"),
    ):
        host.load(given)
    found = {}

    def ask(name: str, **kwargs: Any) -> None:
        with torch.no_grad():
            found[name] = whole(model(**({"input_ids": IDS} | kwargs)).logits)

    ask("the base alone")
    for name in ("lora", "dora", "scaled", "tokens"):
        with host.using({name: 0.7}):
            ask(name)
    with host.using({"lora": 0.3, "dora": -0.5, "scaled": 1.0}):
        ask("three together")
    with host.rows([None, {"dora": 0.5, "lora": 1.0}]):
        ask("rows, one of them bare")
    with host.rows(["scaled", "lora"]):
        ask("rows of their own")
    with host.rows([{"lora": 0.5}, {"lora": 2.0}]):
        ask("rows of one adapter with weights of their own")
    for name in (None, "lora", "dora"):
        host.use(name)
        given = whole(model.get_input_embeddings()(IDS)).detach().requires_grad_()
        whole(model(inputs_embeds=given).logits).square().mean().backward()
        assert given.grad is not None
        found[f"the gradient with {name}"] = given.grad
    host.detach()
    ask("the base after it")
    return found


def by_torch(model: Any, mesh: Any, **changes: Any) -> Any:
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    plan = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
        "lm_head": ColwiseParallel(output_layouts=Replicate()),
    }
    for index in range(2):
        layer = f"model.layers.{index}"
        for name in ("self_attn.q", "self_attn.k", "self_attn.v", "mlp.gate", "mlp.up"):
            plan[f"{layer}.{name}_proj"] = ColwiseParallel()
        for name in ("self_attn.o", "mlp.down"):
            plan[f"{layer}.{name}_proj"] = RowwiseParallel()
    return parallelize_module(model, mesh, plan | changes)


def by_torch_otherwise(model: Any, mesh: Any) -> Any:
    """The embedding by its columns; a head that gives a DTensor, a part on each process."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import ColwiseParallel

    changes = {
        "model.embed_tokens": ColwiseParallel(output_layouts=Replicate()),
        "lm_head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),
    }
    return by_torch(model, mesh, **changes)


def by_transformers(_model: Any, _mesh: Any, folder: Path) -> Any:
    """As transformers reads a model into several processes, by the model's own plan."""
    from transformers import LlamaForCausalLM
    from transformers.distributed import DistributedConfig

    return LlamaForCausalLM.from_pretrained(
        folder,
        distributed_config=DistributedConfig(tp_plan="auto", tp_size=PROCESSES),
        dtype=F64,
        attn_implementation="eager",
    ).eval()


CASES: dict[str, Callable[..., Any]] = {
    "torch": by_torch,
    "torch, otherwise": by_torch_otherwise,
    "transformers": by_transformers,
}


class Block(nn.Module):
    """A block whose tokens can be spread over processes before and after it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(6)
        self.up = nn.Linear(6, 10)
        self.down = nn.Linear(10, 6)
        self.to(F64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        down: torch.Tensor = self.down(self.up(self.norm(x)).tanh())
        return x + down


def of_spread_tokens(mesh: Any) -> dict[str, list[float]]:
    """Return differences for a block that is given some of the tokens, and gives some."""
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    plan = {
        "norm": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(output_layouts=Shard(1)),
    }
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 8, 6, dtype=F64, generator=generator)
    own = distribute_tensor(x, mesh, [Shard(1)]).to_local()
    spread, one_piece = parallelize_module(Block(), mesh, plan), Block()
    hosts = Host(spread), Host(one_piece)
    for host in hosts:
        host.load(adapter(Block(), "lora", 1, 3))
        host.load(adapter(Block(), "dora", 2, 2, "dora"))
    found = {}
    for rows in (["lora", "lora"], [None, "dora"], [{"lora": 0.5, "dora": 1.0}, "lora"]):
        with hosts[0].rows(rows), hosts[1].rows(rows):
            part, want = own.clone().requires_grad_(), x.clone().requires_grad_()
            given = DTensor.from_local(spread(part), mesh, [Shard(1)])
            got, expected = given.full_tensor(), one_piece(want)
            got.square().sum().backward()
            expected.square().sum().backward()
        gradient = distribute_tensor(want.grad, mesh, [Shard(1)]).to_local()
        found[f"{rows}"] = _apart(got, expected)
        found[f"the gradient with {rows}"] = _apart(part.grad, gradient)
    return found


def _apart(got: Any, want: Any) -> list[float]:
    return [(got - want).abs().max().item(), want.abs().max().item()]


def of_bfloat16(mesh: Any) -> tuple[float, float]:
    """Return how far the spread model is from the truth, and the one in one piece."""
    one_piece = llama()

    def answer(model: Any) -> torch.Tensor:
        host = Host(model)
        host.load(adapter(one_piece, "lora", 1, 3))
        with host.using("lora"), torch.no_grad():
            return model(IDS).logits.double()

    rounded = llama(torch.bfloat16)
    truth = answer(llama(torch.bfloat16).double())
    spread = answer(by_torch(llama(torch.bfloat16), mesh))
    errors = ((each - truth).norm().item() for each in (spread, answer(rounded)))
    first, second = errors
    return first, second


def compare(rank: int, folder: str) -> None:
    """What each process does: answers of both models, and how far they are apart."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(PROCESSES)}
    torch.set_num_threads(1)
    met = f"file://{folder}/met"
    dist.init_process_group("gloo", init_method=met, rank=rank, world_size=PROCESSES)
    mesh = init_device_mesh("cpu", (PROCESSES,))
    want = answers(llama())
    found: dict[str, Any] = {}
    for case, spread in CASES.items():
        extra = (Path(folder, "model"),) if case == "transformers" else ()
        got = answers(spread(llama(), mesh, *extra))
        found[case] = {name: _apart(got[name], want[name]) for name in want}
    found["tokens"] = of_spread_tokens(mesh)
    found["bfloat16"] = of_bfloat16(mesh)
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("processes")
    llama().save_pretrained(folder / "model")
    torch.multiprocessing.spawn(compare, (str(folder),), PROCESSES)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(PROCESSES)]


@pytest.mark.parametrize("case", [*CASES, "tokens"])
def test_each_process_answers_as_the_model_in_one_piece(found, case):
    for of_process in found:
        for name, (difference, largest) in of_process[case].items():
            assert difference <= 1e-12 * max(1, largest), name


def test_bfloat16_is_as_near_to_the_truth_as_in_one_piece(found):
    for of_process in found:
        spread, one_piece = of_process["bfloat16"]

        assert 0 < spread <= 2 * one_piece
