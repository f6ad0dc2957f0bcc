"""What `inspect` says of adapters that are more than plain LoRA of linear layers."""

import msgspec

from lora_hub.formats.source import (
    AdapterSource,
    Replacement,
    ScaleSource,
    UpdateSource,
)
from lora_hub.inspect.summary import summarize
from lora_hub.inspect.text import render
from lora_hub.tensors.file import TensorFile
from tests.builders import tensor_bytes, tiny_adapter

SHAPES = {
    "q.a": (2, 4),
    "q.b": (6, 2),
    "q.m": (6,),
    "q.bias": (6,),
    "e.a": (2, 32),
    "e.b": (4, 2),
    "c.a": (2, 3, 5, 5),
    "c.b": (8, 2, 1, 1),
    "x.a": (6, 4),
    "x.b": (10, 6),
    "s": (6,),
    "w": (2, 4),
    "rows": (3, 4),
}
FILE = TensorFile.from_bytes(
    tensor_bytes({name: ("F32", shape) for name, shape in SHAPES.items()}), where="f"
)


def update(target, name, layer="linear", **more):
    a, b = FILE.info(f"{name}.a"), FILE.info(f"{name}.b")
    return UpdateSource(target, 2, 4.0, "alpha/r", a, b, layer, **more)


EVERYTHING = AdapterSource(
    updates=(
        update("conv", "c", "conv"),
        update("embed", "e", "embedding"),
        update("mlp.experts.gate_up_proj", "x", "experts"),
        update("q", "q", magnitude=FILE.info("q.m"), bias=FILE.info("q.bias")),
    ),
    tensors=FILE,
    scales=(ScaleSource("v", "rows", FILE.info("s")),),
    replacements=(
        Replacement("embed.weight", "token_delta", FILE.info("rows"), (1, 2, 5)),
        Replacement("score.weight", "modules_to_save", FILE.info("w")),
    ),
    alora_tokens=(7, 8),
    ties_weights=True,
)


def test_every_number_is_counted_once():
    summary = summarize(EVERYTHING)

    assert summary.parameters == sum(info.elements for info in FILE.header.tensors.values())
    assert summary.parameters == 8 + 12 + 6 + 6 + 64 + 8 + 150 + 16 + 24 + 60 + 6 + 8 + 12


def test_shapes_are_those_of_the_weights():
    shapes = {module.module: module.shape for module in summarize(EVERYTHING).modules}

    assert shapes == {
        "conv": (8, 3, 5, 5),
        "embed": (4, 32),
        "mlp.experts.gate_up_proj": (3, 10, 4),
        "q": (6, 4),
    }


def test_the_text_names_every_kind():
    text = render(summarize(EVERYTHING))

    for said in (
        "5 targets",
        "of DoRA the low-rank part",
        "from the last occurrence of the tokens 7, 8 on",
        "the head takes the embedding's update",
        "conv (conv)",
        "embed (embedding)",
        "gate_up_proj (experts)",
        "3x10x4",
        "q (DoRA, bias)",
        "6 outputs",
        "embed.weight, 3 rows",
        "token_delta",
        "modules_to_save",
    ):
        assert said in text, said


def test_an_adapter_of_scales_alone_has_no_rule_and_no_norm():
    scales = AdapterSource((), FILE, scales=EVERYTHING.scales)

    summary = summarize(scales)

    assert summary.rule is None
    assert summary.modules == ()
    assert "norm" not in render(summary)


def test_plain_lora_is_told_without_any_of_it(tmp_path):
    from lora_hub.formats.detect import open_adapter

    summary = summarize(open_adapter(tiny_adapter(tmp_path / "adapter")))

    assert "(" not in render(summary).splitlines()[-1]
    assert msgspec.to_builtins(summary)["replaced"] == ()
