"""What holds for every adapter: PEFT computes the scalings we read, and packing is a
function of the content."""

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_hub.formats.detect import open_adapter
from lora_hub.formats.peft import config_for
from lora_hub.package.pack import plan_package
from tests.builders import logits, tensor_bytes, tiny_adapter, tiny_base, tiny_model

# Each matches some target of the tiny base, as PEFT's rule says.
PATTERNS = [
    "q_proj",
    "v_proj",
    "self_attn.q_proj",
    "layers.0.self_attn.v_proj",
    "model.layers.1.self_attn.q_proj",
    r"^model\.layers\.1\..*",
    r"layers\.\d+\.self_attn\..*",
]


def patterns(values):
    # Sorted, because PEFT sorts them when it saves, and the first match wins: patterns that
    # overlap in another order make an adapter that PEFT itself cannot load.
    return st.dictionaries(st.sampled_from(PATTERNS), values, max_size=3).map(
        lambda pattern: dict(sorted(pattern.items()))
    )


RANKS = st.integers(1, 4)
ALPHAS = st.one_of(st.integers(1, 64), st.floats(0.125, 64))


@settings(max_examples=12, deadline=None)
@given(
    rank=RANKS,
    alpha=ALPHAS,
    use_rslora=st.booleans(),
    rank_pattern=patterns(RANKS),
    alpha_pattern=patterns(ALPHAS),
)
def test_scalings_we_read_are_those_peft_computes(
    rank, alpha, use_rslora, rank_pattern, alpha_pattern
):
    from peft import PeftModel

    with tempfile.TemporaryDirectory() as folder:
        adapter = tiny_adapter(
            Path(folder, "adapter"),
            rank=rank,
            alpha=alpha,
            use_rslora=use_rslora,
            rank_pattern=rank_pattern,
            alpha_pattern=alpha_pattern,
        )
        source = open_adapter(adapter)
        theirs = PeftModel.from_pretrained(tiny_model(), adapter)
        expected = peft_scalings(theirs)
        expected_logits = logits(theirs)

        assert {u.target: (u.rank, u.scaling) for u in source.updates} == expected

        # And our smallest config makes PEFT compute the same again.
        written = config_for(source)
        (adapter / "adapter_config.json").write_text(json.dumps(written, sort_keys=True))
        again = PeftModel.from_pretrained(tiny_model(), adapter)

        assert peft_scalings(again) == expected
        assert logits(again).equal(expected_logits)


def peft_scalings(model):
    return {
        name.removeprefix("base_model.model."): (
            module.r["default"],
            module.scaling["default"],
        )
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and module.lora_A
    }


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_base(tmp_path_factory.mktemp("base") / "base")


FIELDS = {
    "name": "tiny-lab/verse",
    "version": "1.0.0",
    "task": "text-generation",
    "license": "MIT",
    "created": "2026-01-01T00:00:00Z",
}
TENSORS = {
    f"base_model.model.model.layers.{layer}.self_attn.{part}.lora_{which}.weight": shape
    for layer in (0, 1)
    for part, out in (("q_proj", 16), ("v_proj", 8))
    for which, shape in (("A", (2, 16)), ("B", (out, 2)))
}
CONFIG = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["q_proj", "v_proj"],
    "bias": "none",
    "use_dora": False,
}


@settings(max_examples=20, deadline=None)
@given(
    tensors=st.permutations(sorted(TENSORS)),
    keys=st.permutations(sorted(CONFIG)),
    targets=st.permutations(["q_proj", "v_proj"]),
    dtype=st.sampled_from(["F32", "F16", "BF16", "F64"]),
)
def test_package_digest_depends_on_the_content_alone(base, tensors, keys, targets, dtype):
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        write(Path(one), sorted(TENSORS), sorted(CONFIG), CONFIG["target_modules"], dtype)
        write(Path(other), tensors, keys, targets, dtype)

        plans = [plan_package(Path(src), base=base, **FIELDS) for src in (one, other)]

    assert plans[0].digest == plans[1].digest
    assert joined(plans[0]) == joined(plans[1])


def test_packing_twice_gives_the_same_bytes(base, tmp_path):
    adapter = tiny_adapter(tmp_path / "adapter", rank=3, rank_pattern={"q_proj": 2})

    plans = [plan_package(adapter, base=base, **FIELDS) for _ in range(2)]

    assert joined(plans[0]) == joined(plans[1])


def write(folder, tensors, keys, targets, dtype):
    width = {"F64": 8, "F32": 4}.get(dtype, 2)
    data = {
        name: bytes(sum(map(ord, name)) % 60 for _ in range(shape[0] * shape[1] * width))
        for name, shape in TENSORS.items()
    }
    weights = tensor_bytes({name: (dtype, TENSORS[name]) for name in tensors}, data)
    (folder / "adapter_model.safetensors").write_bytes(weights)
    config = {key: CONFIG[key] for key in keys} | {"target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def joined(plan):
    return {name: b"".join(map(bytes, chunks)) for name, chunks in plan.files.items()}
