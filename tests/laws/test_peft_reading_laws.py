"""Whatever names and flags meet: a file is refused by an error of ours, or read whole."""

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from lora_hub.errors import LoraHubError
from lora_hub.formats import peft_files
from lora_hub.formats.detect import DIALECTS
from lora_hub.formats.dialect import Given, ReadOptions
from lora_hub.formats.peft import read_peft
from lora_hub.tensors.file import TensorFile
from tests.builders import tensor_bytes

P = "base_model.model."
# module → kind; what is said of one kind of layer may be tried on another.
MODULES = {
    "model.embed_tokens": "embedding",
    "lm_head": "linear",
    "h.0.q_proj": "linear",
    "h.0.mlp.experts": "experts",
    "conv": "conv",
    "norm": "linear",
}
FACTORS = {
    "linear": {".lora_A.weight": (2, 6), ".lora_B.weight": (6, 2)},
    "embedding": {".lora_embedding_A": (2, 6), ".lora_embedding_B": (6, 2)},
    "conv": {".lora_A.weight": (2, 6, 3), ".lora_B.weight": (6, 2, 1)},
    "experts": {".lora_A.weight": (4, 6), ".lora_B.weight": (6, 4)},
}
OTHERS = {
    ".lora_B.bias": (6,),
    ".lora_magnitude_vector": (6,),
    ".token_adapter.trainable_tokens_delta": (2, 6),
    ".weight": (6, 6),
    ".bias": (6,),
    ".base_layer.weight": (6, 6),
    ".base_layer.bias": (6,),
    ".original_module.bias": (6,),
    ".modules_to_save.bias": (6,),
}


@st.composite
def adapters(draw):
    """Return a config, and name → (dtype, shape) of a file that often belongs to it."""
    kinds = dict(MODULES)
    if not draw(st.integers(0, 5)):
        kinds[draw(st.sampled_from(sorted(kinds)))] = draw(st.sampled_from(sorted(FACTORS)))
    targets = draw(st.sets(st.sampled_from(sorted(MODULES)), min_size=1, max_size=3))
    config = {
        "peft_type": "LORA",
        "r": 2,
        "use_dora": draw(st.booleans()),
        "lora_bias": not draw(st.integers(0, 3)),
        "bias": draw(st.sampled_from(["none", "all", "lora_only"])),
        "ensure_weight_tying": draw(st.booleans()),
        "modules_to_save": draw(st.lists(st.sampled_from(sorted(MODULES)), max_size=2)),
        "task_type": draw(st.sampled_from([None, "SEQ_CLS", "CAUSAL_LM"])),
        "alora_invocation_tokens": draw(st.sampled_from([None, None, None, [7]])),
    }
    parameters = draw(st.sampled_from([["down_proj"], ["down_proj", "gate_up_proj"]]))
    depths = {"experts": [".base_layer" * depth for depth in range(len(parameters))]}
    shapes = {}
    for target in sorted(targets):
        kind = kinds[target]
        ends = dict(FACTORS[kind])
        ends |= {".lora_magnitude_vector": (6,)} if config["use_dora"] else {}
        ends |= {".lora_B.bias": (6,)} if config["lora_bias"] else {}
        for depth in depths.get(kind, [""]):
            shapes |= {f"{P}{target}{depth}{end}": shape for end, shape in ends.items()}
    if any(kinds[target] == "experts" for target in targets):
        config["target_parameters"] = [f"experts.{name}" for name in parameters]
    for _ in range(draw(st.integers(0, 3))):
        module, end = (
            draw(st.sampled_from(sorted(MODULES))),
            draw(st.sampled_from([*OTHERS])),
        )
        prefix = draw(st.sampled_from([P, P, P, P + P, ""]))
        shapes[f"{prefix}{module}{end}"] = OTHERS[end]
        if end.startswith(".token"):
            config["trainable_token_indices"] = draw(
                st.sampled_from([[3, 1], {"embed_tokens": [3, 1], "lm_head": [0, 2]}])
            )
    wrong = draw(st.sampled_from([None, None, None, *sorted(shapes)]))
    return config, {
        name: ("I64" if name == wrong else "F32", shape) for name, shape in shapes.items()
    }


@settings(max_examples=500)
@given(adapter=adapters())
def test_what_is_read_can_be_written_and_is_read_as_the_same(adapter):
    config, tensors = adapter
    file = TensorFile.from_bytes(tensor_bytes(tensors), where="weights")
    try:
        source = read_peft(config, file, where="adapter")
    except LoraHubError:
        return
    parts = [tensor for update in source.updates for tensor in update.tensors]
    held = [tensor.name for tensor in (*parts, *(r.tensor for r in source.replacements))]

    written = peft_files.write(source).files
    again = DIALECTS["peft"].read(as_given(written), ReadOptions())

    assert len(set(held)) == len(held)
    assert told(again) == told(source)


def as_given(files):
    data = {name: b"".join(map(bytes, chunks)) for name, chunks in files.items()}
    return Given(
        where="again",
        weights_name="adapter_model.safetensors",
        weights=data["adapter_model.safetensors"],
        config=json.loads(data["adapter_config.json"]),
    )


def told(source):
    return (
        [
            (u.target, u.layer, u.rank, u.scaling, u.magnitude is None, u.bias is None)
            for u in source.updates
        ],
        [(r.name, r.rows, r.tensor.dtype) for r in source.replacements],
        (source.alora_tokens, source.ties_weights),
    )
