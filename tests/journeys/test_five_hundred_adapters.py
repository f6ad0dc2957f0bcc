"""500 adapters on the real base within 200 MB: right while they come and go.

Packages of ranks 1 to 16 lie on disk, unsigned, 2 GB as they act in float32. The oracle is
the base in float64 with the dense change in its weights, made from the numbers that were
written; it shares no code with lora_hub.
"""

import ctypes
import gc
import json
import random
import statistics
import sys
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import save_file
from torch.func import functional_call

import lora_hub
from lora_hub import digest
from lora_hub.formats.detect import open_adapter
from lora_hub.manifest import codec
from lora_hub.manifest.document import File
from lora_hub.package import derived, layout

ROOT = Path(__file__).parents[2]
BASE = ROOT / "build" / "base"
COUNT, BUDGET = 500, 200_000_000
# What is no slab: Python's and torch's objects for 500 adapters and 100 residents, files
# as they are read, activations, what the heap keeps. Measured: 47 to 63 MB.
REST = 80_000_000
TOKENS = torch.arange(1, 13).reshape(1, 12)

pytestmark = [
    pytest.mark.base,
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
    pytest.mark.skipif(not BASE.is_dir(), reason="needs build/base (make base)"),
]


def rank_of(index):
    return 1 + index % 16


def factors(index, shapes):
    """Return target → (a, b, scaling) of one adapter: alpha 8, q and v of every layer."""
    generator = torch.Generator().manual_seed(index)
    rank = rank_of(index)

    def numbers(*shape):
        return (torch.randn(*shape, generator=generator) * 0.02).bfloat16()

    return {
        target: (numbers(rank, inp), numbers(out, rank), 8 / rank)
        for target, (out, inp) in shapes.items()
    }


def write_adapter(folder, index, shapes):
    folder.mkdir(exist_ok=True)
    tensors = {}
    for target, (a, b, _) in factors(index, shapes).items():
        tensors[f"base_model.model.{target}.lora_A.weight"] = a
        tensors[f"base_model.model.{target}.lora_B.weight"] = b
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "r": rank_of(index),
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


def pack_all(folder, shapes):
    """Write the packages; return name → folder."""
    write_adapter(folder / "source", 0, shapes)
    packed = lora_hub.pack(
        folder / "source",
        out=folder / "packed",
        name="many/first",
        version="1.0.0",
        base=BASE,
        task="text-generation/verse",
        license="Apache-2.0",
    )
    found = {}
    for index in range(COUNT):
        # As `pack` does, without reading the base again.
        out, name = folder / f"{index:03}", f"many/a{index:03}"
        write_adapter(out, index, shapes)
        modules = derived.modules_of(open_adapter(out))
        info = msgspec.structs.replace(
            packed.manifest.adapter, modules=modules, summary=derived.summary_of(modules)
        )
        files = []
        for path in sorted(out.iterdir()):
            data = path.read_bytes()
            files.append(
                File(
                    path=path.name,
                    role=layout.role_of(path.name),
                    size=len(data),
                    sha256=digest.of_bytes(data),
                )
            )
        manifest = msgspec.structs.replace(
            packed.manifest, name=name, adapter=info, files=tuple(files)
        )
        (out / "lorahub.json").write_bytes(codec.encode(manifest))
        found[name] = out
    return found


def resident_bytes():
    """Return what the process takes now, and at most since `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    held = dict(line.split(":", 1) for line in lines)
    return tuple(int(held[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))


def forget_peak():
    # What the oracle left in the heap would hide what comes next.
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


@pytest.fixture(scope="module")
def model():
    from transformers import AutoModelForCausalLM

    found = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    return found.eval().requires_grad_(requires_grad=False)


@pytest.fixture(scope="module")
def shapes(model):
    return {
        path: tuple(module.weight.shape)
        for path, module in model.named_modules()
        if path.endswith((".q_proj", ".v_proj"))
    }


@pytest.fixture(scope="module")
def packed(tmp_path_factory, shapes):
    return pack_all(tmp_path_factory.mktemp("many"), shapes)


class Oracle:
    """The base with dense changes in its weights."""

    def __init__(self, model, shapes, dtype):
        import copy

        self.model = copy.deepcopy(model).to(dtype)
        self.shapes = shapes
        self.dtype = dtype

    def logits(self, weights):
        changed = {}
        parameters = dict(self.model.named_parameters())
        for name, weight in weights.items():
            for target, (a, b, s) in factors(int(name[-3:]), self.shapes).items():
                full = f"{target}.weight"
                delta = weight * s * (b.to(self.dtype) @ a.to(self.dtype))
                changed[full] = changed.get(full, parameters[full]) + delta
        with torch.no_grad():
            return functional_call(self.model, changed, (TOKENS,)).logits[:, -1].double()


def logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model(tokens).logits[:, -1].double()  # small, as the test counts bytes


def test_five_hundred_adapters_page_in_and_out_within_the_budget(model, shapes, packed):
    names = list(packed)
    sampled = random.Random(5).sample(names, 12)
    pairs = [{one: 0.7, other: -0.4} for one, other in zip(sampled, names, strict=False)]
    exact, plain = (
        Oracle(model, shapes, torch.float64),
        Oracle(model, shapes, torch.float32),
    )
    wanted = [
        (weights, exact.logits(weights), plain.logits(weights))
        for weights in (*({name: 1.0} for name in sampled), *pairs)
    ]
    base = exact.logits({})
    del exact, plain
    bare = logits(model)
    largest = max(
        (folder / "adapter_model.safetensors").stat().st_size for folder in packed.values()
    )
    forget_peak()
    before, _ = resident_bytes()
    most = 0

    host = lora_hub.attach(model, budget="200MB")
    for folder in packed.values():
        host.load(folder, policy="struct")
        most = max(most, host.memory.used_bytes)
    first, ratios = {}, []
    choose = random.Random(6)
    for _ in range(3):
        # Others come in between, so that what is asked for has left and comes back.
        for name in choose.sample(names, 100):
            with host.using(name):
                most = max(most, host.memory.used_bytes)
        for index, (weights, truth, rounded) in enumerate(wanted):
            with host.using(weights):
                found = logits(model)
                most = max(most, host.memory.used_bytes)
            error = (found - truth).norm()
            ratios.append(float(error / (rounded - truth).norm()))
            assert error <= 0.01 * (truth - base).norm()
            assert torch.equal(found, first.setdefault(index, found))
        rows = [None, *sampled[:3]]
        with host.rows(rows):
            batch = logits(model, TOKENS.expand(4, -1))
            most = max(most, host.memory.used_bytes)
        # The kernels of a batch of four round in another order than those of one row.
        assert (batch[0] - base[0]).norm() <= 1e-4 * base[0].norm()
        for row, (_, truth, _) in enumerate(wanted[:3], start=1):
            assert (batch[row] - truth[0]).norm() <= 0.01 * (truth - base)[0].norm()
    _, peak = resident_bytes()
    told = host.memory

    assert len(told.adapters) == COUNT
    assert sum(each.nbytes for each in told.adapters.values()) > 4 * BUDGET
    assert 0.9 * BUDGET < most <= BUDGET
    assert told.used_bytes <= BUDGET
    assert peak - before <= BUDGET + largest + REST
    # What rounding does to one adapter's logits is a matter of luck, to 24 of them is not.
    assert statistics.geometric_mean(ratios) <= 2
    assert torch.equal(logits(model), bare)
    host.detach()
