"""Adapters on the live base beside PEFT: switch, swap, forwards, compilations.

    python benchmarks/runtime.py [--rounds N]

The real base in float32, random adapters of rank 16 on all its linear layers but the head
(210 of them). All that is compared is measured in turn in one process, on one set of
weights that the bare model, ours and PEFT's share. A ratio is the median over the rounds of
what two took in the same round; beside it stands the ratio of the minima, which a
machine that does other things disturbs less. Results go to `results/<date>-runtime.json`.
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
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft.utils.hotswap import hotswap_adapter, hotswap_adapter_from_state_dict
from safetensors.torch import load_file

import lora_hub

ROOT = Path(__file__).parents[1]
BASE = ROOT / "build" / "base"
RESULTS = ROOT / "benchmarks" / "results"
RANK = 16
NAMES = ("one", "two", "three", "four")

# What is measured → the aim for ours over PEFT's, or over the bare base.
OVER_PEFT = {
    "switch": 1 / 100,
    "swap, from a folder": 1 / 10,
    "swap, from memory": 1 / 10,
    "swap, both loaded": 1 / 10,
}
OVER_BASE = {
    "prefill of 128, one adapter": 1.06,
    "one token, one adapter": 1.10,
    "8 rows of 16, one adapter": 1.08,
    "8 rows of 16, four adapters and a bare row": 1.12,
    "8 rows of 16, no row with an adapter": 1.02,
    "prefill of 128, merged": 1.00,
}
OVER_LORA = {"one token, DoRA": 1.10}
SHAPES = {
    "prefill of 128": (1, 128),
    "one token": (1, 1),
    "8 rows of 16": (8, 16),
}
MIXED = [*NAMES, None, *NAMES[:3]]

Timed = Callable[[], float]


class Models:
    """The bare base, ours and PEFT's on the same weights, four adapters in each."""

    def __init__(self, folder: Path) -> None:
        self.bare = transformers.AutoModelForCausalLM.from_pretrained(
            BASE, dtype=torch.float32
        ).eval()
        self.bare.requires_grad_(requires_grad=False)
        self.folders = {name: folder / name for name in (*NAMES, "dora")}
        self.peft = self._peft(folder)
        self.ours = self._copy()
        self.host = lora_hub.attach(self.ours)
        for name in NAMES:
            self.host.load(self.folders[name], as_=name)

    def _copy(self) -> Any:
        """Return a model of its own with the same tensors."""
        shared = {
            id(each): each for each in (*self.bare.parameters(), *self.bare.buffers())
        }
        return copy.deepcopy(self.bare, shared)

    def _peft(self, folder: Path) -> Any:
        torch.manual_seed(0)
        config = peft.LoraConfig(r=RANK, lora_alpha=32, target_modules="all-linear")
        dora = peft.LoraConfig(
            r=RANK, lora_alpha=32, target_modules="all-linear", use_dora=True
        )
        model = peft.get_peft_model(self._copy(), config, adapter_name=NAMES[0])
        for name in (*NAMES[1:], "dora"):
            model.add_adapter(name, dora if name == "dora" else config)
        for key, each in model.named_parameters():
            if "lora_" in key and "magnitude" not in key:
                each.data.normal_(std=0.01)
        model.eval().requires_grad_(requires_grad=False)
        # PEFT puts each adapter but "default" in a folder of its name.
        model.save_pretrained(folder, save_embedding_layers=False)
        return model


def seconds(work: Callable[[], object], times: int = 1) -> float:
    begin = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - begin) / times


def in_turn(works: Mapping[str, Timed], rounds: int) -> dict[str, list[float]]:
    """Return who → seconds of each round, all once a round; the first round is left out."""
    taken: dict[str, list[float]] = {who: [] for who in works}
    for turn in range(rounds + 1):
        for who, work in works.items():
            value = work()
            if turn:
                taken[who].append(value)
    return taken


def ratios(taken: Mapping[str, list[float]], one: str, other: str) -> dict[str, float]:
    pairs = zip(taken[one], taken[other], strict=True)
    return {
        "median": statistics.median(first / second for first, second in pairs),
        "minima": min(taken[one]) / min(taken[other]),
    }


def switching(models: Models, rounds: int) -> dict[str, dict[str, list[float]]]:
    host, adapted = models.host, models.peft
    tokens = torch.tensor([[5]])

    def ours() -> None:
        host.use("two")
        host.use("one")

    def pefts() -> None:
        adapted.set_adapter("two")
        adapted.set_adapter("one")

    def after(switch: Callable[[], None], model: Any) -> Timed:
        """Measure a switch and the token after it, which may have to make things ready."""

        def work() -> float:
            with torch.inference_mode():
                return seconds(lambda: (switch(), model(tokens, use_cache=False)))

        return work

    alone = {
        "ours": lambda: seconds(ours, 20) / 2,
        "PEFT": lambda: seconds(pefts, 2) / 2,
    }
    with_token = {
        "ours": after(lambda: None, models.ours),
        "ours, switched": after(ours, models.ours),
        "PEFT": after(lambda: None, adapted),
        "PEFT, switched": after(pefts, adapted),
    }
    return {
        "switch": in_turn(alone, rounds),
        "two switches and a token": in_turn(with_token, rounds),
    }


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    """Return an adapter's tensors by the names they have in PEFT's model."""
    held = load_file(folder / "adapter_model.safetensors")
    return {
        key.removesuffix("weight") + "one.weight": tensor for key, tensor in held.items()
    }


def swapping(models: Models, rounds: int) -> dict[str, dict[str, list[float]]]:
    host, adapted = models.host, models.peft
    folders = [models.folders[name] for name in ("two", "one")]
    adapters = [lora_hub.load_adapter(folder) for folder in folders]
    states = [state_of(folder) for folder in folders]
    config = adapted.peft_config["one"]
    host.use("one")
    adapted.set_adapter("one")

    def each(swap: Callable[[Any], object], values: list[Any]) -> Timed:
        return lambda: statistics.mean([seconds(lambda v=v: swap(v)) for v in values])

    def from_state(state: dict[str, torch.Tensor]) -> None:
        hotswap_adapter_from_state_dict(adapted, state, "one", config)

    def ours(what: Any) -> None:
        host.swap("one", what)

    def from_folder(folder: Path) -> None:
        hotswap_adapter(adapted, folder, adapter_name="one")

    memory = {"ours": each(ours, adapters), "PEFT": each(from_state, states)}
    found = {"swap, from memory": in_turn(memory, rounds)}
    # A package's adapter is known by its digest: loaded under other names, both are there.
    known = [
        replace(adapter, digest=f"sha256:{index:064}")
        for index, adapter in enumerate(adapters)
    ]
    for name, adapter in zip(("first", "second"), known, strict=True):
        host.load(adapter, as_=name)
    loaded = {"ours": each(ours, known), "PEFT": each(from_state, states)}
    found["swap, both loaded"] = in_turn(loaded, rounds)
    places = {"ours": each(ours, folders), "PEFT": each(from_folder, folders)}
    found["swap, from a folder"] = in_turn(places, rounds)
    return found


def forward(model: Any, shape: tuple[int, int], **given: Any) -> Timed:
    torch.manual_seed(1)
    tokens = torch.randint(0, 1000, shape)
    times = 3 if shape[1] == 1 else 1

    def work() -> float:
        with torch.inference_mode():
            model(tokens, use_cache=False, **given)  # after another model's turn
            return seconds(lambda: model(tokens, use_cache=False, **given), times)

    return work


def forwards(models: Models, rounds: int) -> dict[str, dict[str, list[float]]]:
    host, adapted = models.host, models.peft
    found = {}

    def measured(
        shape: tuple[int, int], acting: Callable[[], Any] = nullcontext, **given: Any
    ) -> dict[str, list[float]]:
        ours = forward(models.ours, shape)

        def inside() -> float:
            with acting():
                return ours()

        works = {
            "bare": forward(models.bare, shape),
            "ours": inside,
            "PEFT": forward(adapted, shape, **given),
        }
        return in_turn(works, rounds)

    host.use("one")
    adapted.set_adapter("one")
    for name, shape in SHAPES.items():
        found[f"{name}, one adapter"] = measured(shape)
    host.use(None)
    few = SHAPES["8 rows of 16"]
    names = [entry or "__base__" for entry in MIXED]
    found["8 rows of 16, four adapters and a bare row"] = measured(
        few, lambda: host.rows(MIXED), adapter_names=names
    )
    found["8 rows of 16, no row with an adapter"] = measured(
        few, lambda: host.rows([None] * 8), adapter_names=["__base__"] * 8
    )
    host.load(models.folders["dora"], as_="dora")
    found["one token, DoRA"] = dora(models, rounds)
    host.use("one")
    adapted.set_adapter("one")
    host.merge()
    merged = {
        "bare": forward(models.bare, SHAPES["prefill of 128"]),
        "ours": forward(models.ours, SHAPES["prefill of 128"]),
    }
    found["prefill of 128, merged"] = in_turn(merged, rounds)
    host.unmerge()
    return found


def dora(models: Models, rounds: int) -> dict[str, list[float]]:
    """Measure the same token with a LoRA and with a DoRA adapter, ours and PEFT's."""

    def using(use: Callable[[str], None], name: str, model: Any) -> Timed:
        work = forward(model, SHAPES["one token"])

        def switched() -> float:
            use(name)
            return work()

        return switched

    host, adapted = models.host, models.peft
    works = {
        "ours, LoRA": using(host.use, "one", models.ours),
        "ours, DoRA": using(host.use, "dora", models.ours),
        "PEFT, LoRA": using(adapted.set_adapter, "one", adapted),
        "PEFT, DoRA": using(adapted.set_adapter, "dora", adapted),
    }
    return in_turn(works, rounds)


def compilations(models: Models, swaps: int) -> dict[str, int]:
    """Return how often torch compiles while adapters are swapped, ours and PEFT's."""
    # Not before: a host that sees torch's compiler keeps its hooks when nothing is used.
    from torch._dynamo.testing import CompileCounter

    tokens = torch.arange(4)[None]
    host, adapted = models.host, models.peft
    adapters = [lora_hub.load_adapter(models.folders[name]) for name in ("two", "three")]
    host.use("one")
    counted = {"ours": CompileCounter(), "PEFT": CompileCounter()}
    torch.compiler.reset()
    compiled = torch.compile(models.ours, backend=counted["ours"])
    with torch.no_grad():
        compiled(tokens, use_cache=False)
        for turn in range(swaps):
            host.swap("one", adapters[turn % 2])
            compiled(tokens, use_cache=False)
        host.use(None)
        torch.compiler.reset()
        compiled = torch.compile(adapted, backend=counted["PEFT"])
        for name in NAMES:
            adapted.set_adapter(name)
            compiled(tokens, use_cache=False)
    torch.compiler.reset()
    return {who: counter.frame_count for who, counter in counted.items()}


def machine() -> dict[str, Any]:
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return {
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(pages * size / 2**30),
        "system": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }


def summary(taken: Mapping[str, dict[str, list[float]]]) -> dict[str, Any]:
    """Return what was measured → milliseconds of each, ratios, the aim."""
    result: dict[str, Any] = {}
    for what, works in taken.items():
        row: dict[str, Any] = {
            who: {
                "median_ms": round(statistics.median(each) * 1e3, 4),
                "minimum_ms": round(min(each) * 1e3, 4),
            }
            for who, each in works.items()
        }
        if what in OVER_BASE:
            row["ours over bare"] = ratios(works, "ours", "bare") | {"aim": OVER_BASE[what]}
            if "PEFT" in works:
                row["PEFT over bare"] = ratios(works, "PEFT", "bare")
        elif what in OVER_PEFT:
            row["ours over PEFT"] = ratios(works, "ours", "PEFT") | {"aim": OVER_PEFT[what]}
        elif what in OVER_LORA:
            aim = {"aim": OVER_LORA[what]}
            row["ours over LoRA"] = ratios(works, "ours, DoRA", "ours, LoRA") | aim
            row["PEFT over LoRA"] = ratios(works, "PEFT, DoRA", "PEFT, LoRA")
        result[what] = row
    return result


def show(results: Mapping[str, Any]) -> None:
    for what, row in results.items():
        print(what)
        for key, value in row.items():
            if "median_ms" in value:
                median, least = value["median_ms"], value["minimum_ms"]
                print(f"    {key:<16} {median:10.3f} ms   least {least:10.3f} ms")
            else:
                aim = f"   aim {value['aim']:.3g}" if "aim" in value else ""
                median, least = value["median"], value["minima"]
                print(f"    {key:<16} {median:10.4f}      minima {least:8.4f}{aim}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11)
    rounds = parser.parse_args().rounds
    warnings.simplefilter("ignore")  # PEFT's advice about what is meant here
    about = machine()
    with tempfile.TemporaryDirectory() as folder:
        models = Models(Path(folder))
        taken = forwards(models, rounds)
        taken |= switching(models, rounds)
        taken |= swapping(models, max(3, rounds // 3))
        results = summary(taken)
        show(results)
        counted = compilations(models, 100)
    print(f"compilations: ours {counted['ours']} in 100 swaps, PEFT {counted['PEFT']} in 4")
    RESULTS.mkdir(exist_ok=True)
    today = dt.datetime.now(dt.UTC).date().isoformat()
    document = {"machine": about, "rounds": rounds, "results": results}
    document["compilations"] = counted
    out = RESULTS / f"{today}-runtime.json"
    out.write_text(json.dumps(document, indent=2) + "\n")
    print(out.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
