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

    times = {}

    def timed(what, do):
        times.setdefault(what, []).append(seconds(do))

    merged = []

    def ours(*, measure):
        merged.append(merge(model, [("it", prepared, 1.0)], measure=measure))

    for _ in range(arguments.rounds):
        timed("merge", lambda: ours(measure=False))
        timed("unmerge", merged.pop().unmerge)
        timed("PEFT merge", peft.merge_adapter)
        timed("PEFT unmerge", peft.unmerge_adapter)
        timed("merge with its report", lambda: ours(measure=True))
        report = merged[0].report
        timed("unmerge", merged.pop().unmerge)

    print(report)
    best = {name: min(each) for name, each in times.items()}
    for name in ("merge", "merge with its report", "unmerge"):
        theirs = best[f"PEFT {name.split()[0]}"]
        print(
            f"{name}: {best[name] * 1e3:.0f} ms, PEFT {theirs * 1e3:.0f} ms, "
            f"ratio {best[name] / theirs:.2f} (aim 1)"
        )
    print(f"base as it was: {digest(model) == before}")
    print(f"PEFT's base as it was: {digest(peft) == theirs_before}")
    if arguments.cycles:
        took = seconds(
            lambda: [
                merge(model, [("it", prepared, 1.0)], measure=False).unmerge()
                for _ in range(arguments.cycles)
            ]
        )
        same = digest(model) == before
        print(f"{arguments.cycles} cycles: {took:.0f} s, base as it was: {same}")


if __name__ == "__main__":
    main()
