"""From a name to an adapter on a live model, beside PEFT; and is it the right base?

    python benchmarks/attach.py [ADAPTERS]

On the real base, in float32, in one process with everything imported:

* attach: an adapter of rank 16 on all 210 linear layers, of random numbers, packed, signed
  and pushed to a registry in a temporary folder. `host.load(name)` (registry, key,
  signature and every digest verified, the package in the cache) in turn with PEFT's
  `PeftModel.from_pretrained(model, folder)` of the same files, of which nothing is
  verified. Medians; the aim is a ratio of at most 1/5. Weights of the base are not compared
  here (policy "struct").
* identity: that comparison, which a host does once for a model, beside hashlib.sha256 over
  the same bytes on all cores, in turn; the aim is at most 1.5 times as long. A base held in
  float32 is compared with the bfloat16 numbers that it was widened from.
* many: ADAPTERS (500 without) different adapters of rank 2 on the same layers stay loaded
  but for the last, which is loaded there and in a host that has none, in turn; the aim is
  at most 1.2. Python's garbage collector, which now and then looks at all that a process
  holds, is on as it always is; its pauses show in the slowest load.
"""

import gc
import hashlib
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers
from msgspec.structs import replace
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import lora_hub
from lora_hub import digest
from lora_hub.base.fit import check_fit
from lora_hub.manifest import codec
from lora_hub.manifest.document import MANIFEST_NAME, Base
from lora_hub.public.keys import keygen
from lora_hub.public.publishing import init_registry
from lora_hub.runtime.base_view import ModelBase
from lora_hub.runtime.host import Host

ROOT = Path(__file__).parents[1]
BASE = ROOT / "build" / "base"
WEIGHTS = "adapter_model.safetensors"
ROUNDS = 15
ADAPTERS = 500
CORES = os.cpu_count() or 1

transformers.utils.logging.disable_progress_bar()


def base_model(dtype: torch.dtype) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(BASE, dtype=dtype).eval()


def in_turn(
    things: Sequence[Callable[[], object]], rounds: int = ROUNDS
) -> list[list[float]]:
    """Return the seconds of each thing in each round but the first, which warms up."""
    seconds: list[list[float]] = [[] for _ in things]
    for number in range(rounds + 1):
        for thing, taken in zip(things, seconds, strict=True):
            start = time.perf_counter()
            cleanup = thing()
            if number:
                taken.append(time.perf_counter() - start)
            if callable(cleanup):
                cleanup()
    return seconds


class Registry:
    """A registry in a folder of its own, a key, and packages of random numbers."""

    def __init__(self, folder: Path) -> None:
        self.location = folder / "registry"
        self.packages = folder / "packages"
        self.packages.mkdir()
        init_registry(self.location, name="bench")
        self.key = keygen(folder / "key")

    def publish(self, name: str, source: Path) -> Path:
        """Pack, sign and push an adapter as bench/<name>; return its package."""
        package = self.packages / name
        lora_hub.pack(
            source,
            out=package,
            name=f"bench/{name}",
            version="1.0.0",
            base=BASE,
            task="text-generation",
            license="Apache-2.0",
            summary="random numbers",
        )
        self._push(package)
        return package

    def publish_like(self, name: str, like: Path) -> None:
        """Publish a package with the same modules and other numbers as bench/<name>."""
        package = shutil.copytree(like, self.packages / name)
        tensors = load_file(like / WEIGHTS)
        save_file(
            {key: torch.randn_like(old) for key, old in tensors.items()}, package / WEIGHTS
        )
        manifest = codec.decode((like / MANIFEST_NAME).read_bytes(), where=name)
        files = tuple(
            replace(
                file,
                size=(package / file.path).stat().st_size,
                sha256=digest.of_bytes((package / file.path).read_bytes()),
            )
            for file in manifest.files
        )
        manifest = replace(manifest, name=f"bench/{name}", files=files)
        (package / MANIFEST_NAME).write_bytes(codec.encode(manifest))
        self._push(package)

    def _push(self, package: Path) -> None:
        lora_hub.sign(package, self.key.private)
        lora_hub.push(package, self.location, self.key.public)


def make_adapter(model: Any, folder: Path, rank: int) -> Path:
    """Save an adapter of random numbers on all linear layers with PEFT."""
    config = LoraConfig(
        task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules="all-linear"
    )
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.02)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    adapted.unload()
    (folder / "README.md").unlink(missing_ok=True)
    return folder


def attach(model: Any, registry: Registry, folder: Path) -> None:
    source = make_adapter(model, folder / "source", rank=16)
    size = (source / WEIGHTS).stat().st_size
    registry.publish("all-linear", source)
    name = "bench/all-linear"
    host = lora_hub.attach(model, registry=registry.location)

    def ours() -> Callable[[], None]:
        host.load(name, policy="struct")
        return lambda: host.unload(name)

    def theirs(**options: Any) -> Callable[[], object]:
        return PeftModel.from_pretrained(model, source, **options).unload

    def hashed() -> None:
        hashlib.sha256((source / WEIGHTS).read_bytes())

    taken = in_turn([ours, theirs, lambda: theirs(low_cpu_mem_usage=True), hashed])
    load, peft, peft_low, read = (statistics.median(each) for each in taken)
    print(f"attach, rank 16 on 210 layers, {size / 1e6:.1f} MB (medians of {ROUNDS})")
    print(f"  {load * 1e3:7.1f} ms  host.load by name, signature and digests verified")
    print(f"  {peft * 1e3:7.1f} ms  PeftModel.from_pretrained, nothing verified")
    print(f"  {peft_low * 1e3:7.1f} ms  the same with low_cpu_mem_usage=True")
    print(f"  {read * 1e3:7.1f} ms  the weights read and hashed alone")
    print(f"  ratio {load / peft:.3f} (aim: at most 0.2), {load / peft_low:.3f}")
    host.detach()


def identity(model: Any, base: Base, dtype: str) -> None:
    """Compare the model with the base, and hash what is to be hashed of it."""
    # What was hashed for the manifest: these bytes, whatever the model is held in.
    with torch.no_grad():
        tensors = {
            name: tensor.bfloat16().view(torch.uint8).numpy().reshape(-1).data
            for name, tensor in model.state_dict().items()
        }
    tensors.pop("lm_head.weight")  # tied to the embedding
    targets = {target.name for target in base.targets}

    def hash_all(names: Sequence[str]) -> None:
        largest_first = sorted(names, key=lambda name: -len(tensors[name]))
        with ThreadPoolExecutor(CORES) as pool:
            pool.map(lambda name: hashlib.sha256(tensors[name]).digest(), largest_first)

    for policy, names in (("targets", list(targets)), ("exact", list(tensors))):
        ours, alone = (
            statistics.median(each)
            for each in in_turn(
                [
                    lambda policy=policy: check_fit(base, ModelBase(model), policy=policy),  # type: ignore[misc]
                    lambda names=names: hash_all(names),  # type: ignore[misc]
                ]
            )
        )
        size = sum(len(tensors[name]) for name in names) / 1e6
        known: dict[Any, Any] = {}
        check_fit(base, ModelBase(model, known), policy=policy)  # type: ignore[arg-type]
        start = time.perf_counter()
        check_fit(base, ModelBase(model, known), policy=policy)  # type: ignore[arg-type]
        again = time.perf_counter() - start
        print(
            f"  {dtype:8s} {policy:7s} {ours * 1e3:6.0f} ms, SHA-256 of {size:.0f} MB on "
            f"{CORES} cores {alone * 1e3:4.0f} ms, ratio {ours / alone:.2f} "
            f"(aim: at most 1.5); when asked again {again * 1e3:.1f} ms"
        )


def many(registry: Registry, folder: Path, count: int) -> None:
    model = base_model(torch.float32)
    first = registry.publish("small", make_adapter(model, folder / "small", rank=2))
    for number in range(count):
        registry.publish_like(f"small-{number}", first)
    names = [f"bench/small-{number}" for number in range(count)]
    full = lora_hub.attach(model, registry=registry.location)
    empty = lora_hub.attach(base_model(torch.float32), registry=registry.location)
    for name in names:  # into the cache
        empty.load(name, policy="struct")
        empty.unload(name)
    gc.collect()
    slowest = 0.0
    for name in names[:-1]:
        start = time.perf_counter()
        full.load(name, policy="struct")
        slowest = max(slowest, time.perf_counter() - start)

    def load(host: Host) -> Callable[[], None]:
        host.load(names[-1], policy="struct")
        return lambda: host.unload(names[-1])

    taken = in_turn([lambda: load(empty), lambda: load(full)], rounds=2 * ROUNDS)
    begin, end = (statistics.median(each) for each in taken)
    print(f"many, {count} adapters of rank 2 on 210 layers (medians of {2 * ROUNDS})")
    print(f"  {begin * 1e3:7.1f} ms  loading one where none is loaded")
    print(f"  {end * 1e3:7.1f} ms  loading one where {count - 1} are")
    print(f"  {slowest * 1e3:7.1f} ms  the slowest of those {count - 1}")
    print(f"  ratio {end / begin:.2f} (aim: at most 1.2)")


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else ADAPTERS
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["LORAHUB_HOME"] = str(folder / "home")
        os.environ["LORAHUB_CACHE"] = str(folder / "cache")
        registry = Registry(folder)
        model = base_model(torch.float32)
        attach(model, registry, folder)
        adapter = lora_hub.load_adapter("bench/all-linear", registry.location)
        assert adapter.base is not None
        print(f"identity of the base (medians of {ROUNDS}, in turn)")
        identity(model, adapter.base, "float32")
        identity(base_model(torch.bfloat16), adapter.base, "bfloat16")
        many(registry, folder, count)


if __name__ == "__main__":
    main()
