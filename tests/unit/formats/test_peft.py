"""Reading PEFT's directories from bytes; the law against PEFT itself is in tests/laws."""

import json

import pytest

from lora_hub import canonical
from lora_hub.errors import FormatError
from lora_hub.formats import peft
from lora_hub.formats.peft import build_config, config_for, read_peft
from lora_hub.tensors.file import TensorFile
from tests.builders import tensor_bytes

Q0 = "model.layers.0.self_attn.q_proj"
Q1 = "model.layers.1.self_attn.q_proj"
V0 = "model.layers.0.self_attn.v_proj"


def factors(*targets, rank=2, size=6, prefix="base_model.model."):
    return {
        f"{prefix}{target}.lora_{which}.weight": ("F32", shape)
        for target in targets
        for which, shape in (("A", (rank, size)), ("B", (size, rank)))
    }


def config(**changes):
    plain = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q_proj"]}
    return plain | changes


def read(config, tensors):
    return read_peft(
        config, TensorFile.from_bytes(tensor_bytes(tensors), where="w"), where="adapter"
    )


def test_reads_every_target_with_its_rank_alpha_and_shapes():
    source = read(config(target_modules=["q_proj", "v_proj"]), factors(V0, Q0))

    assert [update.target for update in source.updates] == [Q0, V0]
    assert source.updates[0].a.shape == (2, 6)
    assert source.updates[0].b.shape == (6, 2)
    assert source.updates[0].scaling == 3.0


def test_rslora_divides_by_the_root_of_the_rank():
    tensors = factors(Q0, rank=4)

    source = read(config(r=4, use_rslora=True), tensors)

    assert source.updates[0].scaling == 3.0


def test_silent_config_means_rank_and_alpha_of_eight():
    source = read({"peft_type": "LORA"}, factors(Q0, rank=8))

    assert source.updates[0].rank == 8
    assert source.updates[0].alpha == 8.0


def test_first_matching_pattern_wins():
    pattern = {"layers.0.self_attn.q_proj": 10, "q_proj": 4}

    source = read(config(alpha_pattern=pattern), factors(Q0, Q1))

    assert [update.alpha for update in source.updates] == [10.0, 4.0]


def test_pattern_matches_whole_dotted_parts_as_a_regular_expression():
    source = read(
        config(r=3, rank_pattern={r"^model\.layers\.\d+\.self_attn\.q_.*": 2}), factors(Q0)
    )

    assert source.updates[0].rank == 2


def test_adapter_trained_on_a_peft_model_carries_the_prefix_twice():
    source = read(config(), factors(Q0, prefix="base_model.model.base_model.model."))

    assert source.updates[0].target == Q0


def test_author_and_task_come_along():
    source = read(
        config(base_model_name_or_path="a/b", revision="main", task_type="CAUSAL_LM"),
        factors(Q0),
    )

    assert (source.base_name, source.base_revision) == ("a/b", "main")
    assert source.task_type == "CAUSAL_LM"


NEUTRAL = [
    {"bias": "none"},
    {"modules_to_save": []},
    {"use_dora": False},
    {"enable_lora": None, "merge_weights": False},  # keys of PEFT 0.2
    {"a_key_of_next_year": {}},
    {"lora_dropout": 0.05, "fan_in_fan_out": True, "peft_version": "0.30"},
    {"init_lora_weights": "gaussian"},
    {"target_modules": r".*\.q_proj"},
    {"target_modules": "all-linear"},
    {"target_modules": None},
    {"target_modules": ["self_attn.q_proj"]},
    {"layers_to_transform": [0], "layers_pattern": "layers"},
    {"exclude_modules": ["v_proj"]},
    {"lora_alpha": 6.5},
    {"lora_alpha": 10**20},
]


@pytest.mark.parametrize("changes", NEUTRAL, ids=repr)
def test_config_that_leaves_plain_lora_as_it_is_is_read(changes):
    assert read(config(**changes), factors(Q0)).updates[0].target == Q0


REFUSED = [
    ({"peft_type": "IA3"}, "peft_type is 'IA3', only 'LORA' is read"),
    ({"peft_type": None}, "peft_type is missing"),
    ({"use_dora": True}, "use_dora is True (DoRA"),
    ({"bias": "lora_only"}, "bias is 'lora_only'"),
    ({"lora_bias": True}, "lora_bias is True"),
    ({"modules_to_save": ["score"]}, "modules_to_save is ['score']"),
    ({"trainable_token_indices": [1]}, "trainable_token_indices is [1]"),
    ({"layer_replication": [[0, 2]]}, "layer_replication is [[0, 2]]"),
    ({"target_parameters": ["experts.w"]}, "target_parameters is"),
    ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens is [5]"),
    ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
    ({"init_lora_weights": "olora"}, "changes the base's weights"),
    ({"a_key_of_next_year": 0.5}, "'a_key_of_next_year' is not known"),
    ({"a_key_of_next_year": "none"}, "'a_key_of_next_year' is not known"),
    ({"r": 4}, "the factors have rank 2, adapter_config.json says 4"),
    ({"r": True}, "r is True, expected an integer"),
    ({"r": 2.0}, "r is 2.0, expected an integer"),
    ({"lora_alpha": 10**400}, "expected a finite number"),
    ({"lora_alpha": float("inf")}, "lora_alpha is inf, expected a finite number"),
    ({"lora_alpha": "6"}, "lora_alpha is '6', expected a finite number"),
    ({"use_rslora": 1}, "use_rslora is 1, expected true or false"),
    ({"rank_pattern": {"q_proj": 0}}, "rank_pattern is {'q_proj': 0}"),
    ({"rank_pattern": {"k_proj": 2}}, "'k_proj' of rank_pattern matches no module"),
    ({"alpha_pattern": {"proj": 2}}, "'proj' of alpha_pattern matches no module"),
    ({"alpha_pattern": {"(": 2}}, "'(' is no regular expression"),
    ({"target_modules": "("}, "'(' is no regular expression"),
    ({"target_modules": ["q_proj", "k_proj"]}, "lists 'k_proj', and the weights hold no"),
    ({"target_modules": ["proj"]}, "lists 'proj'"),
    ({"target_modules": ".*v_proj"}, "which the config's target_modules"),
    ({"exclude_modules": ["q_proj"]}, "leaves out: PEFT would drop it in silence"),
    ({"layers_to_transform": 1}, "leaves out"),
    ({"task_type": "POETRY"}, "task_type is 'POETRY'"),
    ({"base_model_name_or_path": 7}, "base_model_name_or_path is 7"),
]


@pytest.mark.parametrize(("changes", "problem"), REFUSED)
def test_config_that_means_more_or_something_else_is_refused_by_name(changes, problem):
    with pytest.raises(FormatError) as error:
        read(config(**changes), factors(Q0))

    assert problem in error.value.problem
    assert error.value.where.startswith("adapter")


A, B = factors(Q0)
BAD_TENSORS = [
    ({}, "holds no tensors"),
    ({A: ("F32", (2, 6))}, f"{Q0} has no lora_B beside its other factor"),
    ({B: ("F32", (6, 2))}, f"{Q0} has no lora_A"),
    ({A: ("F32", (2, 6)), B: ("F32", (6, 3))}, "expected [rank, in] and [out, rank]"),
    ({A: ("F32", (0, 6)), B: ("F32", (6, 0))}, "expected [rank, in] and [out, rank]"),
    ({A: ("F32", (2, 6, 1, 1)), B: ("F32", (6, 2, 1, 1))}, "only linear layers"),
    ({A: ("F32", (2, 6)), B: ("BF16", (6, 2))}, "the factors are F32 and BF16"),
    ({A: ("I8", (2, 6)), B: ("I8", (6, 2))}, "the factors are I8 and I8"),
    (factors(Q0) | {"base_model.model.score.weight": ("F32", (2,))}, "no low-rank factor"),
    (factors(Q0) | {"w_a_000": ("F32", (2,))}, "'w_a_000' is not named as PEFT does"),
    (
        factors(Q0) | {f"base_model.model.{Q0}.lora_magnitude_vector": ("F32", (6,))},
        "a magnitude of DoRA",
    ),
    (
        factors(Q0) | {"base_model.model.embed.lora_embedding_A": ("F32", (2, 6))},
        "the update of an embedding",
    ),
    (factors(Q0) | {f"base_model.model.{Q0}.lora_B.bias": ("F32", (6,))}, "a bias beside"),
    (
        factors(Q0) | factors(Q0, prefix="base_model.model.base_model.model."),
        f"two tensors are factors of {Q0}",
    ),
    ({"base_model.model.lora_A.weight": ("F32", (2, 6))}, "no low-rank factor"),
]


@pytest.mark.parametrize(("tensors", "problem"), BAD_TENSORS)
def test_weights_that_are_no_pairs_of_factors_are_refused_by_name(tensors, problem):
    with pytest.raises(FormatError) as error:
        read(config(target_modules=None), tensors)

    assert problem in error.value.problem


def test_config_holds_only_what_differs_from_the_defaults_of_peft():
    source = read(config(task_type="CAUSAL_LM"), factors(Q0))

    written = config_for(source, base_name="a/b", base_tensors=[f"{Q0}.weight"])

    assert written == {
        "base_model_name_or_path": "a/b",
        "inference_mode": True,
        "lora_alpha": 6,
        "peft_type": "LORA",
        "r": 2,
        "target_modules": ["q_proj"],
        "task_type": "CAUSAL_LM",
    }
    assert list(written) == sorted(written)


def test_config_names_targets_by_last_parts_only_where_these_match_nothing_else():
    parts = {Q0: (2, 4.0), V0: (2, 4.0)}

    with_more_layers = build_config(
        parts, "alpha/r", base_tensors=[f"{name}.weight" for name in (Q0, Q1, V0)]
    )
    without_a_base = build_config(parts, "alpha/r")

    assert with_more_layers["target_modules"] == [Q0, "v_proj"]
    assert without_a_base["target_modules"] == [Q0, V0]


def test_most_common_rank_is_the_plain_one_and_others_are_patterns():
    parts = {Q0: (2, 4.0), Q1: (3, 4.0), V0: (2, 0.5)}

    written = build_config(parts, "alpha/sqrt(r)")

    assert written["r"] == 2
    assert written["rank_pattern"] == {r"^model\.layers\.1\.self_attn\.q_proj": 3}
    assert written["alpha_pattern"] == {"v_proj": 0.5}
    assert written["use_rslora"] is True


def test_written_config_is_read_back_with_the_same_scalings_whatever_the_order_of_keys():
    parts = {Q0: (2, 4.0), Q1: (3, 5.0), V0: (2, 0.5)}
    tensors = {}
    for target, (rank, _) in parts.items():
        tensors |= factors(target, rank=rank)
    written = build_config(parts, "alpha/r")

    source = read(json.loads(json.dumps(written, sort_keys=True)), tensors)

    assert {u.target: (u.rank, u.alpha) for u in source.updates} == parts


def test_alpha_beyond_the_integers_of_json_is_written_all_the_same():
    written = build_config({Q0: (2, 1e20)}, "alpha/r")

    assert json.loads(canonical.encode(written))["lora_alpha"] == 1e20


def test_tensor_names_are_those_of_peft():
    assert set(peft.tensor_names(Q0)) == set(factors(Q0))
