"""The modules that we take a config to mean are those that PEFT means by it."""

from hypothesis import assume, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from lora_hub.errors import FormatError
from lora_hub.formats.peft_config import check_config
from lora_hub.formats.peft_targets import check_targets, expand

KEYS = [
    f"{prefix}{blocks}.{layer}.{module}"
    for prefix in ("model.", "")
    for blocks in ("layers", "h.3.layers", "decoder.blocks")
    for layer in (0, 1, 11)
    for module in ("attn.q_proj", "attn.out.0", "mlp.experts.1.w1", "classifier.dense")
] + ["classifier", "score", "q_proj", "lm_head"]
NAMES = (
    *("q_proj", "attn.q_proj", "0", "out.0", "w1", "experts.1.w1", "classifier", "dense"),
    *("layers.0.attn.q_proj", KEYS[0], "score", "lm_head"),
)
names = st.lists(st.sampled_from(NAMES), max_size=3)
expressions = st.sampled_from(
    [r".*q_proj", r".*\.(q_proj|w1)", r"model\.layers\.\d+\..*", "q_proj", r".*\.1\..*", ""]
)
numbers = st.sampled_from([0, 1, 11])
configs = st.fixed_dictionaries(
    {"target_modules": names | expressions},
    optional={
        "exclude_modules": names | expressions,
        "layers_pattern": st.sampled_from(["layers", "blocks", ["blocks", "h.3.layers"]]),
        "layers_to_transform": numbers | st.lists(numbers, max_size=2),
        "modules_to_save": names,
    },
)


def theirs(config, key):
    """Return whether PEFT adapts the module, None where it takes no such config."""
    try:
        return bool(check_target_module_exists(LoraConfig(**config), key))
    except ValueError:
        return None


def ours(config, key):
    told = {"peft_type": "LORA", **config}
    try:
        check_config(told, "config")
        # All modules count as saved, so that no entry of the list goes without one.
        check_targets(told, [key], "config", KEYS)
    except FormatError:
        return False
    return True


@settings(max_examples=400)
@given(config=configs, key=st.sampled_from(KEYS))
def test_a_module_is_a_target_where_it_is_one_for_peft(config, key):
    # An empty list beside an expression PEFT refuses, and we take it as none.
    is_list = isinstance(config["target_modules"], list)
    assume(is_list or config.get("layers_to_transform") != [])

    assert ours(config, key) == bool(theirs(config, key))


patterns = st.dictionaries(
    st.sampled_from(
        ["q_proj", r".*\.1\..*", "^model", "w1", r"out\.0", "proj", "layers.0.*"]
    ),
    st.integers(1, 64),
    max_size=3,
)


@given(pattern=patterns, key=st.sampled_from(KEYS))
def test_a_pattern_gives_the_rank_that_it_gives_in_peft(pattern, key):
    expected = pattern.get(get_pattern_key(pattern.keys(), key), 8)
    # Each entry must match something, so all modules are there.
    try:
        found = expand({"rank_pattern": pattern}, "rank_pattern", "r", 8, KEYS, "config")
    except FormatError:
        return

    assert found[key] == expected
