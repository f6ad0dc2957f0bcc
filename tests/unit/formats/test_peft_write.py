"""The smallest config for PEFT, its names of tensors, and what it cannot say."""

import json
from dataclasses import replace

import pytest

from lora_hub import canonical
from lora_hub.errors import LossyConversion
from lora_hub.formats import peft, peft_files
from lora_hub.formats.peft import build_config, config_for, read_peft, tensors_for
from lora_hub.formats.peft_sayable import saved_modules
from lora_hub.formats.source import AdapterSource, Replacement, ScaleSource, UpdateSource
from lora_hub.tensors.file import TensorFile
from tests.builders import tensor_bytes

Q0 = "model.layers.0.self_attn.q_proj"
Q1 = "model.layers.1.self_attn.q_proj"
V0 = "model.layers.0.self_attn.v_proj"
EXPERTS = "model.layers.0.mlp.experts"

FILE = TensorFile.from_bytes(
    tensor_bytes(
        {
            "a": ("F32", (2, 6)),
            "b": ("F32", (6, 2)),
            "kernel": ("F32", (2, 4, 3, 3)),
            "up": ("F32", (6, 1, 1, 1)),
            "up whole": ("F32", (6, 2, 1, 1)),
            "vector": ("F32", (6,)),
        }
    ),
    where="memory",
)
VECTOR = FILE.info("vector")


def update(target=Q0, *, a="a", b="b", rule="alpha/r", alpha=4.0, **more):
    return UpdateSource(target, 2, alpha, rule, FILE.info(a), FILE.info(b), **more)


def source(*updates, **more):
    return AdapterSource(updates=updates or (update(),), tensors=FILE, **more)


def replaced(name, role="modules_to_save", rows=None):
    return Replacement(name, role, VECTOR, rows)


def factors(target, rank=2, size=6):
    return {
        f"base_model.model.{target}.lora_{which}.weight": ("F32", shape)
        for which, shape in (("A", (rank, size)), ("B", (size, rank)))
    }


def test_config_holds_only_what_differs_from_the_defaults_of_peft():
    adapter = source(update(alpha=6.0), task_type="CAUSAL_LM")

    written = config_for(adapter, base_name="a/b", base_tensors=[f"{Q0}.weight"])

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

    again = read_peft(
        json.loads(json.dumps(written, sort_keys=True)),
        TensorFile.from_bytes(tensor_bytes(tensors), where="w"),
        where="adapter",
    )

    assert {u.target: (u.rank, u.alpha) for u in again.updates} == parts


def test_alpha_beyond_the_integers_of_json_is_written_all_the_same():
    written = build_config({Q0: (2, 1e20)}, "alpha/r")

    assert json.loads(canonical.encode(written))["lora_alpha"] == 1e20


def test_tensor_names_are_those_of_peft():
    assert set(peft.tensor_names(Q0)) == set(factors(Q0))


def test_every_kind_of_layer_has_its_names():
    adapter = source(
        update(f"{EXPERTS}.down_proj", layer="experts"),
        update(f"{EXPERTS}.gate_up_proj", layer="experts"),
        update(Q0),
        update("model.embed_tokens", layer="embedding"),
    )

    names = [name.removeprefix("base_model.model.") for name in tensors_for(adapter)]

    assert names == [
        f"{EXPERTS}.lora_A.weight",
        f"{EXPERTS}.lora_B.weight",
        f"{EXPERTS}.base_layer.lora_A.weight",
        f"{EXPERTS}.base_layer.lora_B.weight",
        f"{Q0}.lora_A.weight",
        f"{Q0}.lora_B.weight",
        "model.embed_tokens.lora_embedding_A",
        "model.embed_tokens.lora_embedding_B",
    ]


def test_magnitude_of_a_convolution_is_written_with_axes_of_one():
    conv = update("conv", a="kernel", b="up whole", layer="conv", magnitude=VECTOR)

    magnitude = tensors_for(source(conv))["base_model.model.conv.lora_magnitude_vector"]

    assert (magnitude.name, magnitude.shape) == ("vector", (1, 6, 1, 1))


def test_what_is_replaced_lies_behind_the_wrappers_around_it():
    adapter = source(
        update(Q0),
        update(f"{EXPERTS}.down_proj", layer="experts"),
        update(f"{EXPERTS}.gate_up_proj", layer="experts"),
        replacements=(
            replaced(f"{EXPERTS}.norm.weight", "embedding"),
            replaced(f"{Q0}.bias", "bias"),
            replaced("model.embed_tokens.weight", "token_delta", rows=(3,)),
            replaced("score.weight"),
        ),
    )

    names = [name.removeprefix("base_model.model.") for name in tensors_for(adapter)]

    assert names[-4:] == [
        f"{EXPERTS}.base_layer.base_layer.norm.weight",
        f"{Q0}.base_layer.bias",
        "model.embed_tokens.token_adapter.trainable_tokens_delta",
        "score.weight",
    ]


def test_config_says_what_the_tensors_are_for():
    adapter = source(
        update(Q0, bias=VECTOR),
        alora_tokens=(7,),
        ties_weights=True,
        replacements=(
            replaced(f"{Q0}.bias", "bias"),
            replaced("model.embed_tokens.weight", "token_delta", rows=(5, 3)),
            replaced("score.bias"),
            replaced("score.weight"),
        ),
    )

    config = config_for(adapter)

    assert config["alora_invocation_tokens"] == [7]
    assert config["bias"] == "lora_only"
    assert config["ensure_weight_tying"] is True
    assert config["lora_bias"] is True
    assert config["modules_to_save"] == ["score"]
    assert config["trainable_token_indices"] == {"model.embed_tokens": [5, 3]}
    assert list(config) == sorted(config)


def test_biases_beyond_the_targets_are_all():
    adapter = source(replacements=(replaced("norm.bias", "bias"),))

    assert config_for(adapter)["bias"] == "all"


SAVED = [
    (["score.weight"], None, ["score"]),
    (["head.0.weight", "head.2.weight"], None, ["head.0", "head.2"]),
    (["head.scale", "head.0.weight"], None, ["head"]),
    (["classifier.dense.weight", "norm.weight"], "SEQ_CLS", ["classifier", "norm"]),
    (["pre_classifier.weight"], "TOKEN_CLS", ["classifier"]),
    (["qa_outputs.weight"], "QUESTION_ANS", ["qa_outputs"]),
]


@pytest.mark.parametrize(("names", "task", "modules"), SAVED)
def test_modules_to_save_lists_modules_none_within_another(names, task, modules):
    assert saved_modules(map(replaced, names), task) == modules


def test_update_of_a_tied_embedding_gives_the_plain_rank_and_alpha():
    adapter = source(
        update("embed_tokens", alpha=9.0, layer="embedding"),
        update(Q0, alpha=4.0),
        update(Q1, alpha=4.0),
        ties_weights=True,
    )

    config = config_for(adapter)

    # PEFT finds those of the tied layer, which has no name here, by no pattern.
    assert config["lora_alpha"] == 9
    assert config["alpha_pattern"] == {"q_proj": 4}


def test_tying_of_an_embedding_whose_name_peft_does_not_tie_is_a_loss():
    adapter = source(update("wte", layer="embedding"), update(Q0), ties_weights=True)

    with pytest.raises(LossyConversion, match="which PEFT does not tie"):
        config_for(adapter)


def test_two_rules_of_scaling_are_said_as_one_where_that_is_exact():
    four = replace(update(Q1, rule="alpha/sqrt(r)", alpha=8.0), rank=4)

    config = config_for(source(update(Q0), four))

    assert config["alpha_pattern"] == {r"^model\.layers\.1\.self_attn\.q_proj": 16}
    assert "use_rslora" not in config


CONV = {"a": "kernel", "layer": "conv"}
UNSAID = [
    (AdapterSource((), FILE), "without one update of low rank"),
    (source(scales=(ScaleSource(Q0, "rows", VECTOR),)), "factors on outputs or inputs"),
    (
        source(update(Q0, magnitude=VECTOR), update(Q1)),
        f"DoRA for some targets and not for {Q1}",
    ),
    (source(update(Q0), update(Q1, bias=VECTOR)), "a bias beside the factors for some"),
    (source(update(magnitude=VECTOR, bias=VECTOR)), "DoRA and a bias beside the factors"),
    (
        source(update("conv", b="up", magnitude=VECTOR, **CONV)),
        "DoRA of a convolution in groups, conv",
    ),
    (source(update("x.w", layer="experts", magnitude=VECTOR)), "DoRA of experts, x.w"),
    (
        source(update("wte", layer="embedding", magnitude=VECTOR), ties_weights=True),
        "DoRA of tied embeddings, wte",
    ),
    (
        source(update("x.w", layer="experts", bias=VECTOR)),
        "a bias beside the factors of exp",
    ),
    (
        source(update("wte", layer="embedding", bias=VECTOR)),
        "the factors of embedding, wte",
    ),
    (
        source(update("wte", layer="embedding"), alora_tokens=(1,)),
        "invocation tokens (aLoRA) with embedding, wte",
    ),
    (
        source(update(magnitude=VECTOR), alora_tokens=(1,)),
        "invocation tokens (aLoRA) with DoRA",
    ),
    (
        source(update(Q0), replace(update(Q1, rule="alpha/sqrt(r)", alpha=0.1), rank=3)),
        f"two rules of scaling, as of {Q1}",
    ),
    (
        source(update("x.one", layer="experts"), update("x.two", layer="experts")),
        "several parameters of one module whose order is not known",
    ),
    (
        source(update("x"), update("x.w", layer="experts")),
        "an update of a module and one of its parameters, x",
    ),
    (
        source(update("classifier.dense"), task_type="SEQ_CLS"),
        "an update of classifier.dense within a module that is saved whole",
    ),
    (
        source(update(Q0), replacements=(replaced(f"{Q0}.weight"),)),
        f"an update of {Q0} within a module that is saved whole",
    ),
    (
        source(
            update("wte", layer="embedding"),
            replacements=(replaced("wte.weight", "token_delta", (1,)),),
        ),
        "rows of wte.weight beside its own update",
    ),
]


@pytest.mark.parametrize(("adapter", "loss"), UNSAID)
@pytest.mark.parametrize("write", [config_for, tensors_for, peft_files.write])
def test_what_peft_cannot_say_is_refused_by_name(write, adapter, loss):
    with pytest.raises(LossyConversion) as error:
        write(adapter)

    assert any(loss in each for each in error.value.losses)
