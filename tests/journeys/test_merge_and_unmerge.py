"""Adapters merged into a live model: it answers as attached, and comes back whole."""

import hashlib
import random
from pathlib import Path

import pytest
import torch

import lora_hub
from lora_hub.errors import ComposeError, InputError, LoraHubError
from tests import peft_zoo as zoo
from tests.builders import logits, tiny_adapter, tiny_model

ROOT = Path(__file__).parents[2]


def digests(model):
    return {
        name: hashlib.sha256(
            tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        ).hexdigest()
        for name, tensor in model.state_dict().items()
    }


def answer(model):
    """Return what a model of the zoo gives for a fixed small input."""
    with torch.no_grad():
        if not hasattr(model, "config"):
            numbers = torch.linspace(-1, 1, 2 * 4 * 64).reshape(2, 4, 64)
            return model(numbers.to(next(model.parameters()).dtype))
        return model(input_ids=torch.arange(24).reshape(2, 12) % 32).logits


def hooks_of(model):
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks)
        for module in model.modules()
    )


# Of the largest output, some hundred roundings of the dtype.
NEAR = {torch.float64: 1e-13, torch.float32: 1e-5}


def dtype_for(case):
    # torch has no grouped product of experts in float64 on the CPU.
    has_experts = case.model in (zoo.mixtral, zoo.gpt_oss)
    return torch.float32 if has_experts else torch.float64


@pytest.mark.parametrize("name", sorted(zoo.CASES.keys() - {"alora"}))
def test_merged_is_attached(name, tmp_path):
    """I-8: merging gives what the attached model gives, biases and all.

    I-16: also where a tensor has two uses, and one of them changes.
    """
    case = zoo.CASES[name]
    zoo.save(case, tmp_path)
    model = zoo.model(case).to(dtype := dtype_for(case))
    near = NEAR[dtype]
    before, bare = digests(model), answer(model)
    host = lora_hub.attach(model)
    host.load(tmp_path, as_="own")
    host.use({"own": -0.7})
    attached = answer(model)

    host.merge(untie=True)

    scale = float(attached.abs().max())
    assert float((answer(model) - attached).abs().max()) <= near * scale
    assert float((bare - attached).abs().max()) >= 1e-6 * scale
    host.unmerge()
    assert digests(model) == before
    assert float((answer(model) - attached).abs().max()) <= near * scale


PAIRS = [
    ("dora", "plain"),
    ("dora", "dora"),
    ("dora of embedding", "rows"),
    ("convolutions with biases", "dora of convolutions"),
    ("experts and all else", "experts"),
    ("tied update", "rows of tied"),
]


@pytest.mark.parametrize("names", PAIRS, ids=" + ".join)
def test_two_merged_are_two_attached(names, tmp_path):
    """I-18: the norms of a second DoRA are those of the base, not of what was merged."""
    dtype = dtype_for(zoo.CASES[names[0]])
    model = zoo.model(zoo.CASES[names[0]]).to(dtype)
    host = lora_hub.attach(model)
    for index, name in enumerate(names):
        base = zoo.model(zoo.CASES[names[0]])
        zoo.save(zoo.CASES[name], tmp_path / str(index), base)
        host.load(tmp_path / str(index), as_=str(index))
    weights = {"0": 0.6, "1": -1.3}
    host.use(weights)
    attached, before = answer(model), digests(model)

    host.merge()

    scale = float(attached.abs().max())
    assert float((answer(model) - attached).abs().max()) <= NEAR[dtype] * scale
    assert dict(host.used) == weights
    host.detach()
    assert digests(model) == before


def test_a_merged_model_has_no_hook_that_acts(tmp_path):
    model = tiny_model()
    plain = hooks_of(model)
    host = lora_hub.attach(model)
    host.load(tiny_adapter(tmp_path), as_="own")

    host.merge("own")

    assert hooks_of(model) == plain


def test_what_was_used_acts_again_after_another_was_merged(tmp_path):
    model = tiny_model()
    host = lora_hub.attach(model)
    for seed, name in enumerate(("one", "two")):
        host.load(tiny_adapter(tmp_path / name, seed=seed), as_=name)
    host.use("one")
    used = logits(model)

    host.merge({"two": 0.5})
    merged = logits(model)
    host.unmerge()

    assert not torch.equal(merged, used)
    assert torch.equal(logits(model), used)


def test_an_alora_is_not_merged(tmp_path):
    case = zoo.CASES["alora"]
    zoo.save(case, tmp_path)
    model = zoo.model(case)
    host = lora_hub.attach(model)
    host.load(tmp_path, as_="own")
    before = digests(model)

    with pytest.raises(ComposeError, match="invocation tokens"):
        host.merge("own")

    assert digests(model) == before


def test_what_would_be_wrong_while_merged_is_refused(tmp_path):
    model = tiny_model()
    host = lora_hub.attach(model)
    folder = tiny_adapter(tmp_path)
    host.load(folder, as_="own")
    host.merge("own")
    merged = logits(model)

    for refused in (
        lambda: host.use(None),
        lambda: host.merge("own"),
        lambda: host.swap("own", folder),
        lambda: host.load(folder, as_="other"),
    ):
        with pytest.raises(InputError, match="merged"):
            refused()

    assert torch.equal(logits(model), merged)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("seed", range(3))
def test_no_sequence_of_calls_leaves_a_bit_behind(dtype, seed, tmp_path):
    """I-9: attach, use, merge, unmerge, unload, load, detach, in any order and number."""
    draw = random.Random(seed)
    model = tiny_model(dtype=dtype)
    folders = {
        "plain": tiny_adapter(tmp_path / "plain"),
        "dora": tiny_adapter(tmp_path / "dora", use_dora=True, targets=["v_proj"]),
        "head": tiny_adapter(tmp_path / "head", modules_to_save=["lm_head"]),
    }
    before, bare = digests(model), logits(model)
    names = sorted(folders)
    host = lora_hub.attach(model)

    def weights():
        return {
            name: draw.uniform(-1, 1) for name in draw.sample(names, draw.randint(1, 2))
        }

    steps = {
        "load": lambda: host.load(folders[name := draw.choice(names)], as_=name),
        "use": lambda: host.use(weights()),
        "bare": lambda: host.use(None),
        "merge": lambda: host.merge(draw.choice([None, weights()])),
        "unmerge": host.unmerge,
        "unload": lambda: host.unload(draw.choice(names)),
    }
    done = set()
    for _ in range(100):
        step = draw.choice(sorted(steps))
        try:
            steps[step]()
            done.add(step)
        except LoraHubError:  # not loaded, merged already, in use: refused, nothing done
            pass
        logits(model)
    host.detach()

    assert done == steps.keys()
    assert digests(model) == before
    assert torch.equal(logits(model), bare)


@pytest.mark.base
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keep", ["memory", "checkpoint"])
def test_the_real_base_comes_back_from_merging_published_adapters(dtype, keep):
    """I-10: bit for bit, after each of several cycles."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = ROOT / "build" / "base"
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).eval()
    tokens = AutoTokenizer.from_pretrained(base)("It was night", return_tensors="pt")
    before = digests(model)
    host = lora_hub.attach(model, ROOT / "registry")
    # A float16 copy is another base than the one of the manifest.
    policy = "struct" if dtype == torch.float16 else None
    names = [
        host.load(f"style/{name}", policy=policy).name for name in ("milton", "shakespeare")
    ]
    host.use(dict.fromkeys(names, 0.5))
    with torch.no_grad():
        attached = model(**tokens).logits.float()

    for _ in range(3):
        report = host.merge(keep=keep if keep == "memory" else base)
        with torch.no_grad():
            merged = model(**tokens).logits.float()
        host.unmerge()

        assert digests(model) == before
    # Rounding the weights loses of each change what the report says.
    assert 0.9 < report.total.kept < 1.1
    assert (merged - attached).norm() <= 0.1 * attached.norm()
