import re
import time

import pytest

from lora_hub.errors import FormatError
from lora_hub.formats import patterns
from lora_hub.formats.patterns import Budget, Pattern
from lora_hub.formats.peft_targets import check_targets, expand

NAMES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.11.mlp.down_proj",
    "model.visual.blocks.3.attn.qkv",
    "model.language_model.layers.2.mlp.experts.7.up_proj",
    "transformer.h.0.attn.c_attn",
    "lm_head",
]

# As people and tools write them; the long ones are those of Unsloth and ms-swift.
WRITTEN = [
    r".*\.(q_proj|v_proj)",
    r".*\.layers\.[0-5]\..*_proj$",
    r"^(?!.*visual).*(?:q_proj|up_proj|qkv)",
    r"^(model\.language_model(?=\.).*\.(up_proj|down_proj))$",
    (
        r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|up_proj).*?)|"
        r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|down_proj)))"
    ),
    r"(?P<layer>model\.layers\.\d{1,2})\.\w+\.\w+",
    r"(.*\.)?(q_proj)$",
    r"(.*\.)?(^lm_head)$",
    r"lm_head{1}|[]a-z_.0-9]+[^]x]",
    "all.linear",
    "",
]


COSTLY = "(" + "|".join(f"m{'x?' * 30}{i}" for i in range(8)) + "|m).*q"


def test_patterns_of_one_config_share_what_they_may_cost():
    keys = [f"m.{number}.q" for number in range(40)]
    config = {"target_modules": COSTLY, "exclude_modules": COSTLY + "!"}
    alone = Budget()
    check_targets({"target_modules": COSTLY}, keys, "config", budget=alone)
    one = Budget().left - alone.left

    for changes in (config, config | {"modules_to_save": [COSTLY + "!"]}):
        shared = Budget(one + one // 2)
        with pytest.raises(FormatError, match="takes more than"):
            check_targets(changes, keys, "config", budget=shared)
    for key in ("rank_pattern", "alpha_pattern"):
        with pytest.raises(FormatError, match="takes more than"):
            expand({key: {COSTLY: 1}}, key, "r", 8, keys, "config", Budget(one // 2))


def test_names_of_layers_are_paid_for():
    keys = [f"m.{number}.q" for number in range(100)]
    config = {
        "target_modules": ["q"],
        "layers_to_transform": [0],
        "layers_pattern": [f"n{number}" for number in range(9000)],
    }

    with pytest.raises(FormatError, match=r"matching 'n\d+' takes more than"):
        check_targets(config, keys, "config")


def match(expression: str, name: str, *, whole: bool) -> bool:
    pattern = Pattern(expression, where="config", budget=Budget(), whole=whole)
    return pattern.is_match(name)


@pytest.mark.parametrize("expression", WRITTEN)
@pytest.mark.parametrize("name", NAMES)
def test_answers_as_the_re_module_does(expression, name):
    assert match(expression, name, whole=False) == bool(re.match(expression, name))
    assert match(expression, name, whole=True) == bool(re.fullmatch(expression, name))


@pytest.mark.parametrize(
    "expression",
    [
        "(([a-z._]|[0-9]|.)*)*!",
        "(.*.*.*.*.*.*.*.*.*.*)*!",
        "(a|a)" * 40 + "!",
        "(m|[a-z._0-9]|.)*(.*.*)*!",
        "((((((.?){1,99}){1,99}){1,99}){1,99}){1,99}){1,99}!",
    ],
)
def test_a_pattern_that_keeps_re_busy_for_ever_is_answered_at_once(expression):
    start = time.perf_counter()

    found = match(expression, "model.layers.0.self_attn.q_proj" * 8, whole=True)

    assert not found
    assert time.perf_counter() - start < 5


def test_a_pattern_beyond_the_steps_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(patterns, "STEPS", 900)
    pattern = Pattern(r".*\.(q_proj|v_proj)", where="c#/p", budget=Budget(900))

    with pytest.raises(FormatError, match=r"q_proj.*takes more than 900 steps"):
        pattern.is_match("model.layers.0.self_attn.q_proj" * 8)


@pytest.mark.parametrize(
    ("expression", "named"),
    [
        (r"(a)\1", r"\\\\1"),
        (r"(?<=a)b", r"\(\?<="),
        (r"(?i)Q_PROJ", r"\(\?i\)"),
        (r"(?>a*)b", r"\(\?>"),
        (r"a*+b", r"\*\+"),
        (r"\x41*", r"\\\\x"),
        ("(" * 60 + ")" * 60, "more than 50 groups"),
        ("(" * 3000 + ")" * 3000, "nests too deep"),
        ("a" * 30_000, "30000 characters"),
        ("a)|(b", "is no regular expression"),
        ("*", "is no regular expression"),
    ],
)
def test_refuses_by_name_what_it_does_not_read(expression, named):
    with pytest.raises(FormatError, match=named) as raised:
        Pattern(expression, where="config#/target_modules", budget=Budget(), whole=True)

    assert raised.value.where == "config#/target_modules"
    assert len(raised.value.problem) < 200


KEYS = ["model.layers.0.self_attn.q_proj", "model.layers.7.self_attn.q_proj"]


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_a_hostile_pattern_of_a_config_is_told_to_match_nothing(key):
    config = {key: {"(([a-z._]|[0-9]|.)*)*!": 2}}

    with pytest.raises(FormatError, match="matches no module"):
        expand(config, key, "r", 8, KEYS, "config")


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": "(([a-z._]|[0-9]|.)*)*!"},
        {"target_modules": None, "exclude_modules": "(([a-z._]|[0-9]|.)*)*"},
    ],
)
def test_a_hostile_expression_of_a_config_chooses_as_any_other(config):
    with pytest.raises(FormatError, match="leaves out"):
        check_targets(config, KEYS, "config")


def test_layers_are_chosen_by_a_plain_name_and_by_no_expression():
    config = {"target_modules": ["q_proj"], "layers_to_transform": [0, 7]}

    check_targets(config | {"layers_pattern": "layers"}, KEYS, "config")
    with pytest.raises(FormatError, match="leaves out"):
        check_targets(config | {"layers_pattern": ["blocks"]}, KEYS, "config")
    with pytest.raises(FormatError, match="no plain name"):
        check_targets(config | {"layers_pattern": "(a|a)*"}, KEYS, "config")
