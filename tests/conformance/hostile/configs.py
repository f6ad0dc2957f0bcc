"""Configs that are bombs, that two readers understand differently, or another's."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.conformance.hostile.case import (
    CONFIG,
    WEIGHTS,
    config,
    configured,
    rows,
    safetensors,
)

PLAIN = json.dumps(config()).encode()

# PEFT asks `re` whether the name of a module matches, which here can be cut into parts in
# more ways than anybody has time for.
BOMB = r"(((\w+)+)+\.?)+!"


def text(old: bytes, new: bytes) -> bytes:
    assert old in PLAIN
    return PLAIN.replace(old, new, 1)


def many_targets(
    modules: Sequence[str] | None = None, **changes: Any
) -> Callable[[Path], None]:
    """Return the builder of an adapter of rank 1 on thousands of modules."""
    paths = modules or [f"m.{i}.q_proj" for i in range(12_000)]
    names = [
        f"base_model.model.{path}.lora_{side}.weight" for path in paths for side in "AB"
    ]
    header = {
        name: {"dtype": "F32", "shape": [1, 1], "data_offsets": [4 * at, 4 * at + 4]}
        for at, name in enumerate(names)
    }

    def build(folder: Path) -> None:
        data = safetensors(header, bytes(4 * len(names)))
        (folder / "adapter" / WEIGHTS).write_bytes(data)
        (folder / "adapter" / CONFIG).write_text(json.dumps(config(r=1, **changes)))

    return build


# For 5,000 modules each of these takes 1.3 million steps of the four that are allowed.
COSTLY = "(" + "|".join(f"m{'x?' * 30}{i}" for i in range(8)) + "|m).*q_proj"

four_patterns = many_targets(
    [f"m.{i}.q_proj" for i in range(5000)],
    target_modules=COSTLY,
    exclude_modules=COSTLY + "!",
    rank_pattern={COSTLY: 1},
    alpha_pattern={COSTLY: 1},
)


CASES = (
    *rows(
        "adapter",
        "validate: LH021",
        "25 duplicate keys",
        (
            "config with a key given twice",
            configured(text(b'"r": 2', b'"r": 64, "r": 2')),
            "'r' stands twice",
        ),
        (
            "config with a key given twice by an escape",
            configured(text(b'"r": 2', b'"\\u0072": 64, "r": 2')),
            "'r' stands twice",
        ),
        (
            "config with a nested key given twice",
            configured(text(b'"r": 2', b'"r": 2, "rank_pattern": {"q": 1, "q": 2}')),
            "'q' stands twice",
        ),
    ),
    *rows(
        "adapter",
        "validate: LH021",
        "27 numbers that are none",
        ("rank of 2**63", configured(r=1 << 63), "rank"),
        ("rank below zero", configured(r=-2), "r is -2"),
        ("rank that is true", configured(r=True), "r is True"),
        ("rank with a point", configured(r=2.5), "r is 2.5"),
        ("rank that is a text", configured(r="2"), "r is '2'"),
        (
            "alpha that is NaN",
            configured(text(b'"lora_alpha": 4', b'"lora_alpha": NaN')),
            "NaN is no JSON number",
        ),
        (
            "alpha beyond all floats",
            configured(text(b'"lora_alpha": 4', b'"lora_alpha": 1e999')),
            "beyond what a float holds",
        ),
        (
            "alpha of five thousand digits",
            configured(text(b'"lora_alpha": 4', b'"lora_alpha": ' + b"9" * 5000)),
            "more than 4300 digits",
        ),
    ),
    *rows(
        "adapter",
        "validate: LH021",
        "31 scale bomb",
        ("alpha of 1e200", configured(lora_alpha=1e200), "lora_alpha is 1e+200"),
        (
            "alpha of an integer that no float holds",
            configured(lora_alpha=10**400),
            "expected a finite number",
        ),
    ),
    *rows(
        "adapter",
        "validate: LH021",
        "28 floods",
        (
            "config nested a hundred thousand deep",
            configured(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
            "32 levels",
        ),
        (
            "config of lists within lists",
            configured(text(b'["q_proj"]', b"[" * 50_000 + b"]" * 50_000)),
            "32 levels",
        ),
        (
            "config of five megabytes",
            configured(PLAIN + b" " * 5_000_000),
            "at most 4194304 are read",
        ),
        (
            "target_modules that doubles with every character",
            configured(target_modules=BOMB),
            "leaves out",
        ),
        (
            "exclude_modules that doubles with every character",
            configured(exclude_modules=BOMB.replace("!", "j")),
            "leaves out",
        ),
        (
            "rank_pattern that doubles with every character",
            configured(rank_pattern={BOMB: 2}),
            "matches no module",
        ),
        (
            "pattern of nested counts",
            configured(target_modules="((((.{0,999}){0,999}){0,999}){0,999})!"),
            "leaves out",
        ),
        (
            "pattern of a hundred thousand characters",
            configured(target_modules="(" + "a|" * 50_000 + "b)"),
            "at most 20000 are read",
        ),
        (
            "pattern of ten thousand groups in one another",
            configured(target_modules="(" * 5000 + "a" + ")" * 5000),
            "deep",
        ),
        (
            "pattern with a back reference",
            configured(target_modules=r"(.*)\1\1\1q_proj"),
            "which is not read",
        ),
        (
            "four patterns, each just within the limit",
            four_patterns,
            "takes more than",
        ),
        (
            "two hundred thousand names of layers",
            many_targets(
                layers_to_transform=[0], layers_pattern=[f"n{i}" for i in range(200_000)]
            ),
            "takes more than",
        ),
        (
            "a hundred thousand parameters of twelve thousand modules",
            many_targets(target_parameters=[f"m.x{i}.w" for i in range(100_000)]),
            "no such thing",
        ),
        (
            "names of hundreds of parts",
            many_targets(
                [f"{'x.' * 450}{i}.q_proj" for i in range(1900)],
                target_modules=["q_proj", *(f"q{i}" for i in range(100))],
            ),
            "no such module",
        ),
        (
            "thirty thousand patterns of ranks",
            configured(rank_pattern={f"layer{i}.*x{i}": 2 for i in range(30_000)}),
            "takes more than",
        ),
    ),
    *rows(
        "adapter",
        "validate: LH021",
        "fact 6 spelling",
        ("config with a byte order mark", configured(b"\xef\xbb\xbf" + PLAIN), "not JSON"),
        ("config in UTF-16", configured(PLAIN.decode().encode("utf-16")), "UTF-8"),
        (
            "base name with half a surrogate",
            configured(base_model_name_or_path="tiny-lab/\ud800"),
            "half of a surrogate",
        ),
        ("config that is not UTF-8", configured(text(b"tiny", b"\xff\xfe")), "not UTF-8"),
        ("config with a comment", configured(text(b"{", b"{ // r\n")), "not JSON"),
        ("second config behind the first", configured(PLAIN * 2), "not JSON"),
        ("config that is a list", configured(b"[" + PLAIN + b"]"), "expected an object"),
        ("config that is empty", configured(b""), "not JSON"),
        ("config of NUL bytes", configured(bytes(4096)), "not JSON"),
    ),
    *rows(
        "adapter",
        "validate: LH021",
        "wild 16 another's schema",
        (
            "config of AdapterHub",
            configured(
                json.dumps(
                    {
                        "config": {"mh_adapter": False},
                        "hidden_size": 4,
                        "model_type": "bert",
                    }
                ).encode()
            ),
            "AdapterHub",
        ),
        ("config of prompt tuning", configured(peft_type="PROMPT_TUNING"), "PROMPT_TUNING"),
        ("config of a method nobody knows", configured(peft_type="ZORA"), "ZORA"),
        ("peft_type that is a list", configured(peft_type=["LORA"]), "peft_type"),
        (
            "kind of MLX's fine-tuning that is a list",
            configured(b'{"fine_tune_type": ["lora"], "lora_parameters": {}}'),
            "fine_tune_type is ['lora']",
        ),
        (
            "key that may change the effect and nobody knows",
            configured(lora_temperature=0.5),
            "'lora_temperature' is not known",
        ),
    ),
    *rows(
        "adapter",
        "validate: LH021",
        "23 remote code",
        (
            "config that names code to run",
            configured(auto_map={"AutoModel": "modeling_evil.Evil"}),
            "auto_map",
        ),
    ),
    *rows(
        "adapter",
        "validate: LH021",
        "33 hidden payload",
        (
            "base that is changed by the initialisation",
            configured(init_lora_weights="pissa"),
            "changes the base's weights",
        ),
        (
            "layers of the base repeated",
            configured(layer_replication=[[0, 1], [0, 1]]),
            "layer_replication",
        ),
    ),
    *rows(
        "adapter",
        "validate: LH014",
        "29 names",
        (
            "base name with an escape sequence",
            configured(base_model_name_or_path="\x1b]0;owned\x07\x1b[2Jtiny-lab/tiny"),
            "U+001B",
        ),
        (
            "base name that runs backwards",
            configured(base_model_name_or_path="tiny-lab/\u202eynit"),
            "U+202E",
        ),
        (
            "three hundred thousand texts that steer",
            configured(**{f"k\x1b{i}": "\u202e" for i in range(120_000)}),
            "900 more of this rule",
        ),
        ("key that runs backwards", configured(**{"a\u202eb": None}), "U+202E"),
    ),
)
