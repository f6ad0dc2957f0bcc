"""Merging into a live model and taking it back, beside PEFT's merge_adapter, in turn.

The base in build/base (`make base`), bfloat16, and a random adapter for all its linear
layers. Each round merges and unmerges once with each, on models of their own; minima of the
rounds are compared, since whatever else the machine does only adds.
"""

import argparse
import hashlib
import tempfile
import time
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from lora_hub.adapter.load import load
from lora_hub.formats.detect import open_adapter
from lora_hub.runtime.merged import merge
from lora_hub.runtime.prepare import prepare

BASE = Path(__file__).parents[1] / "build" / "base"
RANK = 8


def base_model():
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.bfloat16)


def adapter_folder(folder):
    torch.manual_seed(0)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    model = get_peft_model(base_model(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def digest(model):
    hasher = hashlib.sha256()
    for parameter in model.parameters():
        hasher.update(parameter.detach().view(torch.uint8).numpy())
    return hasher.hexdigest()


def seconds(do):
    start = time.perf_counter()
    do()
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--cycles", type=int, default=0, help="merges before a digest")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        adapter = adapter_folder(Path(folder))
        model = base_model()
        prepared = prepare(model, load(open_adapter(adapter)), where="it")
        peft = PeftModel.from_pretrained(base_model(), adapter)
    before, theirs_before = digest(model), digest(peft)

    times = {"merge": [], "unmerge": [], "PEFT merge": [], "PEFT unmerge": []}
    report = None
    for _ in range(arguments.rounds):
        merged = []
        times["merge"].append(
            seconds(lambda: merged.append(merge(model, [("it", prepared, 1.0)])))  # noqa: B023
        )
        report = merged[0].report
        times["unmerge"].append(seconds(merged[0].unmerge))
        times["PEFT merge"].append(seconds(peft.merge_adapter))
        times["PEFT unmerge"].append(seconds(peft.unmerge_adapter))

    print(report)
    best = {name: min(each) for name, each in times.items()}
    for name in ("merge", "unmerge"):
        ratio = best[name] / best[f"PEFT {name}"]
        ours, theirs = best[name] * 1e3, best[f"PEFT {name}"] * 1e3
        print(f"{name}: {ours:.0f} ms, PEFT {theirs:.0f} ms, ratio {ratio:.2f} (aim 1)")
    print(
        f"base as it was: {digest(model) == before}, PEFT's {digest(peft) == theirs_before}"
    )
    if arguments.cycles:
        took = seconds(
            lambda: [
                merge(model, [("it", prepared, 1.0)]).unmerge()
                for _ in range(arguments.cycles)
            ]
        )
        same = digest(model) == before
        print(f"{arguments.cycles} cycles: {took:.0f} s, base as it was: {same}")


if __name__ == "__main__":
    main()
