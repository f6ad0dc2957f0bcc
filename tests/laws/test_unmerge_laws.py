"""What holds for every merge on a live model: the bits come back, and are those of files.

A SHA-256 over the bytes of every parameter is the judge of what came back. What is merged
is compared bit for bit with the tensors that `lora_hub.merge` writes for the same adapters
and weights, read by the safetensors library.
"""

import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

import lora_hub
from lora_hub.adapter.adapter import Adapter
from lora_hub.adapter.load import load
from lora_hub.adapter.update import Update
from lora_hub.formats.detect import open_adapter
from lora_hub.runtime.merged import merge
from lora_hub.runtime.prepare import prepare
from tests import peft_zoo as zoo

# beartype, which checks the annotations, draws which items of a list it looks at.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the .random. module inside")

HALVES = [torch.bfloat16, torch.float16]
weights = st.floats(-4, 4, allow_subnormal=False)


def digest(model):
    hasher = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        hasher.update(name.encode())
        hasher.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
    return hasher.hexdigest()


def net(dtype, seed=0):
    torch.manual_seed(seed)
    layers = nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 6, bias=False), nn.Embedding(4, 6)
    return nn.Sequential(*layers).to(dtype)


SHAPES = {"0": (5, 7), "2": (6, 5), "3": (6, 4)}


@st.composite
def adapters(draw):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def update(target):
        out, inp = SHAPES[target]
        rank = draw(st.integers(1, 4))
        dtype = draw(st.sampled_from([torch.float32, *HALVES]))
        has = draw(st.sets(st.sampled_from(["p", "q", "bias", "bias_scale", "dora"])))
        vectors = {
            "p": torch.randn(out, generator=generator).double(),
            "q": torch.randn(inp, generator=generator).double(),
            "bias": torch.randn(out, generator=generator).double(),
            "bias_scale": torch.randn(out, generator=generator).double(),
            "magnitude": torch.rand(out, generator=generator).double() + 0.5,
        }
        if "dora" in has:  # alone
            has = {"magnitude"}
        if target != "0":  # the one that has a bias
            has -= {"bias", "bias_scale"}
        return Update(
            a=torch.randn(rank, inp, generator=generator).to(dtype),
            b=torch.randn(out, rank, generator=generator).to(dtype),
            scaling=torch.randn(rank, generator=generator).double(),
            layer="embedding" if target == "3" else "linear",
            **{name: vectors[name] for name in has},
        )

    targets = draw(st.sets(st.sampled_from(sorted(SHAPES)), min_size=1))
    return Adapter({target: update(target) for target in sorted(targets)})


@settings(max_examples=60)
@given(
    st.sampled_from([*HALVES, torch.float32]),
    st.lists(st.tuples(adapters(), weights), min_size=1, max_size=3),
    st.integers(1, 3),
)
def test_any_merges_one_after_the_other_leave_no_bit_behind(dtype, parts, times):
    """I-9: the base's digest is unchanged by any sequence of merging and taking back."""
    model = net(dtype)
    before = digest(model)
    acting = [
        (str(index), prepare(model, adapter, where="it"), weight)
        for index, (adapter, weight) in enumerate(parts)
    ]

    for count in range(times):
        merged = merge(model, acting[count % len(acting) :], verify=True)
        merged.unmerge()

    assert digest(model) == before


@settings(max_examples=40)
@given(st.lists(st.tuples(adapters(), weights), min_size=1, max_size=3))
def test_a_merge_is_the_sum_of_what_each_adapter_alone_makes(parts):
    """I-18: each DoRA has the norms of the unmerged base, whatever else is merged."""
    model = net(torch.float64)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    acting = [(prepare(model, adapter, where="it"), weight) for adapter, weight in parts]
    wanted = dict(base)
    for prepared, weight in acting:
        merged = merge(model, [("alone", prepared, 1.0)])
        for name, tensor in model.state_dict().items():
            wanted[name] = wanted[name] + weight * (tensor - base[name])
        merged.unmerge()

    merge(
        model, [(str(n), prepared, weight) for n, (prepared, weight) in enumerate(acting)]
    )

    for name, tensor in model.state_dict().items():
        scale = 1 + float(wanted[name].norm()) + float(base[name].norm())
        assert float((tensor - wanted[name]).norm()) <= 1e-13 * scale * 40, name


@pytest.mark.parametrize("dtype", HALVES)
def test_a_thousand_merges_leave_the_base_bit_for_bit(dtype):
    """I-10: where subtracting what was added drifts, no parameter changes in a bit."""
    model = nn.Sequential(nn.Linear(7, 5, bias=False)).to(dtype)
    before = digest(model)
    update = Update(torch.randn(2, 7), torch.randn(5, 2), torch.ones(2).double() / 3)
    prepared = prepare(model, Adapter({"0": update}), where="it")

    for count in range(1000):
        merged = merge(model, [("it", prepared, 1 - 0.001 * count)])
        merged.unmerge()

    assert digest(model) == before


# What a checkpoint has a place for, with what is merged into a live model.
SAVED = [
    "plain",
    "rslora",
    "patterns",
    "gpt2",
    "lora_bias",
    "bias of all",
    "head",
    "embedding",
    "rows",
    "rows of tied",
    "tied update",
    "experts and all else",
    "experts stored transposed",
    "dora",
    "dora of embedding",
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", SAVED)
def test_the_bits_are_those_that_merging_into_a_checkpoint_writes(name, dtype, tmp_path):
    case = zoo.CASES[name]
    zoo.save(case, tmp_path / "adapter")
    model = zoo.model(case).to(dtype)
    model.save_pretrained(tmp_path / "base", save_original_format=False)
    before = digest(model)
    adapter = load(open_adapter(tmp_path / "adapter"))
    prepared = prepare(model, adapter, where="it")
    weights = (1.0,) if dtype == torch.float16 else (0.7, -0.2)

    merge(model, [("it", prepared, weight) for weight in weights])
    lora_hub.merge(
        tmp_path / "base",
        [(tmp_path / "adapter", weight) for weight in weights],
        tmp_path / "out",
    )

    ours, files = model.state_dict(), load_file(tmp_path / "out" / "model.safetensors")
    assert digest(model) != before
    for each, tensor in files.items():
        bits = ours[each].contiguous().view(torch.uint8)
        assert torch.equal(bits, tensor.contiguous().view(torch.uint8)), each
