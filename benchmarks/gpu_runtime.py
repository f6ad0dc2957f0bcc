"""Adapters on a GPU: products, decoding, merging, memory, and from a folder to a token.

    python benchmarks/gpu_runtime.py [--tiny] [--rounds N] [--out FOLDER] [SECTION …]

A random base of Llama-3-8B's shape in bfloat16, or of Llama-3.2-1B's where less than 64 GiB
are free; adapters of rank 8 to 64 on all linear layers but the head. What is compared is
measured in turn in one process on one set of weights; a ratio is of medians. The products
of the kernels are measured by replaying CUDA graphs, models as they run by themselves and
once as a graph of the whole model, whose rows take other adapters between replays.
Results go to `<date>-gpu_runtime.json`, with the device in words. `--tiny` runs through on
any machine, to show that the program works: its figures mean nothing.
"""

import argparse
import copy
import datetime as dt
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

import lora_hub
from lora_hub.adapter.adapter import Adapter
from lora_hub.adapter.update import Update
from lora_hub.kernels.grouped import (
    add_grouped,
    expand_grouped,
    is_available,
    shrink_grouped,
)
from lora_hub.kernels.rows import RowLists
from lora_hub.kernels.table import Table
from lora_hub.public.models import save

SIZES = {
    "Llama-3-8B": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    },
    "Llama-3.2-1B": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    },
    "tiny": {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128,
    },
}  # fmt: skip
ROOM_FOR_8B = 64 * 2**30
CONTEXT = 128  # tokens each row has behind it when it decodes
# Layers of one block that read the same input, in the order in which they run.
GROUPS = (
    ("q_proj", "k_proj", "v_proj"),
    ("o_proj",),
    ("gate_proj", "up_proj"),
    ("down_proj",),
)

Work = Callable[[], object]


class Setting:
    """The device, a base on it, and how much of everything is measured."""

    def __init__(self, *, tiny: bool, rounds: int) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if not (tiny or self.device.type == "cuda"):
            sys.exit("there is no GPU here; --tiny shows that the program works")
        self.rounds = 2 if tiny else rounds
        self.batches = (1, 2, 3) if tiny else (1, 8, 64)
        free = torch.cuda.mem_get_info()[0] if self.device.type == "cuda" else 0
        self.size = "tiny" if tiny else list(SIZES)[free < ROOM_FOR_8B]
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        config = transformers.LlamaConfig(**SIZES[self.size], tie_word_embeddings=False)
        with self.device:
            self.bare = transformers.LlamaForCausalLM(config).eval()
        torch.set_default_dtype(torch.float32)
        self.bare.requires_grad_(requires_grad=False)
        self.linear = {
            name: module
            for name, module in self.bare.named_modules()
            if isinstance(module, nn.Linear) and not name.endswith("lm_head")
        }

    def ranks(self) -> list[int]:
        """Return one rank for each of as many adapters as the largest batch has rows."""
        steps = (2, 3, 4) if self.size == "tiny" else range(8, 65, 8)
        return [steps[number % len(steps)] for number in range(self.batches[-1])]

    def model(self) -> Any:
        """Return a model of its own with the same tensors."""
        own = (*self.bare.parameters(), *self.bare.buffers())
        return copy.deepcopy(self.bare, {id(each): each for each in own})

    def adapter(self, rank: int, name: str, device: str | None = None) -> Adapter:
        def normal(*shape: int) -> Tensor:
            made = torch.randn(shape, dtype=torch.bfloat16, device=self.device) * 0.01
            return made.to(device or self.device)

        one = torch.ones(rank, dtype=torch.float64)
        return Adapter(
            {
                target: Update(
                    normal(rank, layer.in_features), normal(layer.out_features, rank), one
                )
                for target, layer in sorted(self.linear.items())
            },
            name=name,
        )

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, work: Work, times: int = 1) -> float:
        self.synchronize()
        begin = time.perf_counter()
        for _ in range(times):
            work()
        self.synchronize()
        return (time.perf_counter() - begin) / times

    def in_turn(self, works: Mapping[str, Work], times: int = 1) -> dict[str, float]:
        """Return who → median seconds, all once a round; the first two rounds warm up."""
        taken: dict[str, list[float]] = {who: [] for who in works}
        for turn in range(self.rounds + 2):
            for who, work in works.items():
                value = self.seconds(work, times)
                if turn >= 2:
                    taken[who].append(value)
        return {who: statistics.median(values) for who, values in taken.items()}


def over(taken: Mapping[str, float], bare: str = "bare") -> dict[str, Any]:
    return {
        "milliseconds": {who: 1000 * value for who, value in taken.items()},
        f"over {bare}": {who: value / taken[bare] for who, value in taken.items()},
    }


def replayed(setting: Setting, work: Work) -> Work:
    """Return what replays the work as a CUDA graph, or the work itself without a GPU."""
    if setting.device.type != "cuda":
        return work
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def products(setting: Setting) -> dict[str, Any]:
    """All linear layers of one decoding step, alone and with a row's own adapter each."""
    if not is_available(setting.device):
        return {"not measured": "the kernels do not run on this device"}
    sites = {name: number for number, name in enumerate(setting.linear)}
    table = Table(
        setting.device, torch.bfloat16, sites=len(sites), slots=setting.batches[-1]
    )
    factors = []
    for slot, rank in enumerate(setting.ranks()):
        adapter = setting.adapter(rank, str(slot))
        factors.append(
            {
                sites[target]: (update.a, update.b.T.contiguous())
                for target, update in adapter.updates.items()
            }
        )
        table.put(slot, factors[-1])
    found = {}
    for batch in setting.batches:
        inputs = {
            width: torch.randn(batch, width, dtype=torch.bfloat16, device=setting.device)
            for width in {layer.in_features for layer in setting.linear.values()}
        }
        rows, none = (
            RowLists(setting.device, rows=batch, entries=batch, per_row=1) for _ in range(2)
        )
        pairs = [[(slot, 1.0)] for slot in range(batch)]
        rows.write(pairs)
        none.write([[]] * batch)
        blocks = _blocks(setting)
        works = {
            "bare": _plain(blocks, inputs),
            "every row its own adapter": _grouped(blocks, inputs, table, rows),
            "no row with an adapter": _grouped(blocks, inputs, table, none),
        }
        works = {who: replayed(setting, work) for who, work in works.items()}
        found[f"batch {batch}"] = over(setting.in_turn(works, times=10))
    # Written between replays: what a swap and another batch cost beside the graph.
    written = setting.in_turn(
        {
            "swap": lambda: table.put(0, factors[-1]),
            "rows": lambda: rows.write(pairs),
        }
    )
    found["microseconds"] = {who: 1e6 * value for who, value in written.items()}
    return found


# Layers that read one input, each with its number.
Block = list[tuple[int, nn.Linear]]


def _blocks(setting: Setting) -> list[Block]:
    blocks: dict[tuple[str, tuple[str, ...]], Block] = {}
    for number, (name, layer) in enumerate(setting.linear.items()):
        parent, _, leaf = name.rpartition(".")
        group = next(group for group in GROUPS if leaf in group)
        blocks.setdefault((parent, group), []).append((number, layer))
    return list(blocks.values())


def _plain(blocks: list[Block], inputs: Mapping[int, Tensor]) -> Work:
    def work() -> None:
        for block in blocks:
            for _, layer in block:
                nn.functional.linear(inputs[layer.in_features], layer.weight)

    return work


def _grouped(
    blocks: list[Block], inputs: Mapping[int, Tensor], table: Table, rows: RowLists
) -> Work:
    def work() -> None:
        for block in blocks:
            width = block[0][1].in_features
            x = inputs[width]
            shrunk = shrink_grouped(x, table, [number for number, _ in block], rows)
            for (number, layer), t in zip(block, shrunk, strict=True):
                y = nn.functional.linear(x, layer.weight)
                expand_grouped(y, t, table, number, rows)

    return work


def prefill(setting: Setting) -> dict[str, Any]:
    """One layer's product over many tokens, alone and with one adapter of each rank."""
    if not is_available(setting.device):
        return {"not measured": "the kernels do not run on this device"}
    tokens = 32 if setting.size == "tiny" else 2048
    target, layer = next(iter(setting.linear.items()))
    x = torch.randn(tokens, layer.in_features, dtype=torch.bfloat16, device=setting.device)
    works = {"bare": replayed(setting, lambda: nn.functional.linear(x, layer.weight))}
    for rank in sorted(set(setting.ranks())):
        update = setting.adapter(rank, "").updates[target]
        table = Table(setting.device, torch.bfloat16, sites=1, slots=1, max_rank=rank)
        table.put(0, {0: (update.a, update.b.T.contiguous())})
        rows = RowLists(setting.device, rows=1, entries=1, per_row=1)
        rows.write_all([(0, 1.0)])

        def work(table: Table = table, rows: RowLists = rows) -> None:
            add_grouped(nn.functional.linear(x, layer.weight), x, table, 0, rows)

        works[f"rank {rank}"] = replayed(setting, work)
    return {f"{tokens} tokens": over(setting.in_turn(works, times=10))}


def _decoding(model: Any, setting: Setting, batch: int, around: Any, **given: Any) -> Work:
    """Return one step of decoding behind `CONTEXT` tokens, its cache left as it was."""
    tokens = torch.zeros(batch, CONTEXT, dtype=torch.long, device=setting.device)
    with torch.inference_mode():
        past = model(tokens, use_cache=True).past_key_values

    def work() -> None:
        with torch.inference_mode(), around():
            model(tokens[:, :1], past_key_values=past, use_cache=True, **given)
            past.crop(-1)

    return work


def decode(setting: Setting) -> dict[str, Any]:
    """One step of decoding through the whole model: bare, ours, PEFT's.

    Ours by the grouped kernels, where they run, and by torch's own products.
    """
    ours, plain, theirs = setting.model(), setting.model(), setting.model()
    host, by_torch = lora_hub.attach(ours), lora_hub.attach(plain, kernels="torch")
    wrapped: Any = None
    held = _allocated()
    exact = 0
    for number, rank in enumerate(setting.ranks()):
        adapter = setting.adapter(rank, str(number), "cpu")
        exact += sum(
            2 * (each.a.numel() + each.b.numel()) for each in adapter.updates.values()
        )
        host.load(adapter, as_=str(number))
        del adapter
    grown = _allocated() - held
    for number, rank in enumerate(setting.ranks()):
        by_torch.load(setting.adapter(rank, str(number), "cpu"), as_=str(number))
    for number, rank in enumerate(setting.ranks()):
        config = peft.LoraConfig(
            r=rank, lora_alpha=rank, target_modules="all-linear", init_lora_weights=False
        )
        if wrapped is None:
            wrapped = peft.get_peft_model(theirs, config, "0", autocast_adapter_dtype=False)
        else:
            wrapped.add_adapter(str(number), config, autocast_adapter_dtype=False)
    wrapped.eval()
    found: dict[str, Any] = {}
    for batch in setting.batches:
        names = [str(number) for number in range(batch)]
        works = {
            "bare": _decoding(setting.bare, setting, batch, nullcontext),
            "ours": _decoding(ours, setting, batch, lambda names=names: host.rows(names)),
            "ours by torch": _decoding(
                plain, setting, batch, lambda names=names: by_torch.rows(names)
            ),
            "PEFT's": _decoding(wrapped, setting, batch, nullcontext, adapter_names=names),
        }
        found[f"batch {batch}, as many adapters"] = over(setting.in_turn(works))
    if setting.device.type == "cuda":
        found["bytes of an adapter on the device"] = grown / len(setting.ranks())
        found["over the bytes of its factors"] = grown / exact
    host.detach()
    by_torch.detach()
    return found


def graphs(setting: Setting) -> dict[str, Any]:
    """A token a row through the whole model, captured once, with other adapters later."""
    if not is_available(setting.device):
        return {"not measured": "the kernels do not run on this device"}
    ours = setting.model()
    host = lora_hub.attach(ours)
    for number, rank in enumerate(setting.ranks()):
        host.load(setting.adapter(rank, str(number), "cpu"), as_=str(number))
    found: dict[str, Any] = {}
    for batch in setting.batches:
        tokens = torch.zeros(batch, 1, dtype=torch.long, device=setting.device)
        names = [str(number) for number in range(batch)]

        def step(model: Any, tokens: Tensor = tokens) -> Work:
            return torch.inference_mode()(lambda: model(tokens, use_cache=False))

        bare = replayed(setting, step(setting.bare))
        with host.rows(names), host.capturing():
            graph = replayed(setting, step(ours))
        # What a replay does is told by what is in force when it is measured.
        with host.rows(names):
            own = setting.in_turn({"bare": bare, "every row its own adapter": graph}, 10)
        none = setting.in_turn({"bare": bare, "no row with an adapter": graph}, 10)
        found[f"batch {batch}"] = over(own)
        found[f"batch {batch}, base alone"] = over(none)

        def other_rows(names: list[str] = names) -> None:
            with host.rows(names):
                pass

        found[f"batch {batch}, microseconds of other rows and back"] = (
            1e6 * setting.in_turn({"rows": other_rows}, 10)["rows"]
        )
    host.detach()
    return found


def _allocated() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def merging(setting: Setting) -> dict[str, Any]:
    """Merging in place, beside reading and writing the same weights once."""
    model = copy.deepcopy(setting.bare)
    host = lora_hub.attach(model)
    host.load(setting.adapter(setting.ranks()[1], "merged", "cpu"), as_="merged")
    host.use("merged")
    weights = [model.get_submodule(name).weight for name in setting.linear]

    def read_and_write() -> None:
        for weight in weights:
            weight.mul_(1)

    taken: dict[str, list[float]] = {"read and write": [], "merge": [], "unmerge": []}
    for _ in range(setting.rounds):
        taken["read and write"].append(setting.seconds(read_and_write))
        taken["merge"].append(setting.seconds(host.merge))
        taken["unmerge"].append(setting.seconds(host.unmerge))
    host.detach()
    medians = {who: statistics.median(values) for who, values in taken.items()}
    return over(medians, "read and write")


def cold(setting: Setting) -> dict[str, Any]:
    """From a folder nobody has read to the first token; the disk's cache is warm."""
    ours, theirs = setting.model(), setting.model()
    rank = setting.ranks()[1]
    token = torch.zeros(1, 1, dtype=torch.long, device=setting.device)
    config = peft.LoraConfig(r=rank, target_modules="all-linear", init_lora_weights=False)
    wrapped = peft.get_peft_model(
        theirs, config, "first", autocast_adapter_dtype=False
    ).eval()
    host = lora_hub.attach(ours)
    taken: dict[str, list[float]] = {"ours": [], "PEFT's": []}
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        save(setting.adapter(rank, "cold", "cpu"), Path(folder, "cold"))
        ours(token)
        wrapped(token)
        for turn in range(setting.rounds + 1):
            name = f"cold{turn}"

            def first_token(name: str = name) -> None:
                host.load(Path(folder, "cold"), as_=name)
                host.use(name)
                ours(token)

            def theirs_first(name: str = name) -> None:
                wrapped.load_adapter(
                    Path(folder, "cold"), name, autocast_adapter_dtype=False
                )
                wrapped.set_adapter(name)
                wrapped(token)

            for who, work in (("ours", first_token), ("PEFT's", theirs_first)):
                value = setting.seconds(work)
                if turn:
                    taken[who].append(value)
            host.use(None)
            host.unload(name)
            wrapped.set_adapter("first")
            wrapped.delete_adapter(name)
    return over({who: statistics.median(each) for who, each in taken.items()}, "PEFT's")


SECTIONS: dict[str, Callable[[Setting], dict[str, Any]]] = {
    "products": products,
    "prefill": prefill,
    "decode": decode,
    "graphs": graphs,
    "merging": merging,
    "cold": cold,
}


def machine(setting: Setting) -> dict[str, Any]:
    if setting.device.type == "cuda":
        about = torch.cuda.get_device_properties(0)
        words = f"one {about.name}, {about.total_memory / 2**30:.0f} GiB"
    else:
        words = f"no GPU: {os.cpu_count()} cores, {platform.machine()}"
    return {
        "device": words,
        "base": f"random weights of the shape {setting.size}, bfloat16",
        "torch": torch.__version__,
        "peft": peft.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--tiny", action="store_true", help="run through on any machine")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--out", type=Path, help="a folder for the results; none with --tiny"
    )
    given = parser.parse_args()
    warnings.filterwarnings("ignore", module="peft|transformers")  # not ours to mend
    setting = Setting(tiny=given.tiny, rounds=given.rounds)
    results: dict[str, Any] = {}
    for name in given.sections or SECTIONS:
        results[name] = SECTIONS[name](setting)
        print(name, json.dumps(results[name], indent=2), flush=True)
        if setting.device.type == "cuda":
            torch.cuda.empty_cache()
    document = {"machine": machine(setting), "rounds": setting.rounds, "results": results}
    folder = given.out or (None if given.tiny else Path(__file__).parent / "results")
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        today = dt.datetime.now(dt.UTC).date()
        out = folder / f"{today}-gpu_runtime.json"
        out.write_text(json.dumps(document, indent=2) + "\n")
        print(out)


if __name__ == "__main__":
    main()
