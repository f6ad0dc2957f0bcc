"""Reading PEFT's directories from bytes: what is refused, and by which words.

What PEFT itself saves is in `test_peft_semantics.py`, a law of scalings in tests/laws.
"""

import pytest

from lora_hub.errors import FormatError
from lora_hub.formats.peft import read_peft
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
    {"bias": "lora_only"},  # a layer without bias has none to train
    {"bias": None},
    {"modules_to_save": []},
    {"modules_to_save": ["score", "score", "nothing"]},
    {"use_dora": False},
    {"use_dora": None, "lora_bias": None, "ensure_weight_tying": None},
    {"enable_lora": None, "merge_weights": True},  # keys of PEFT 0.2
    {"a_key_of_next_year": {}},
    {"lora_dropout": 0.05, "fan_in_fan_out": True, "peft_version": "0.30"},
    {"init_lora_weights": "gaussian"},
    {"init_lora_weights": "mica"},
    {"target_modules": r".*\.q_proj"},
    {"target_modules": "all-linear"},
    {"target_modules": "All-Linear"},
    {"target_modules": None},
    {"target_modules": ["self_attn.q_proj"]},
    {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["k_proj"]},
    {"layers_to_transform": [0], "layers_pattern": "layers"},
    {"layers_to_transform": 0, "layers_pattern": ["blocks", "layers"]},
    {"layers_to_transform": [], "layers_pattern": None},
    {"layers_to_transform": 7, "target_modules": [Q0]},  # the whole path is meant anyway
    {"exclude_modules": ["v_proj"]},
    {"exclude_modules": r".*\.v_proj"},
    {"lora_alpha": 6.5},
    {"lora_alpha": 10**20},
    {"ensure_weight_tying": True},
    {"trainable_token_indices": []},
]


@pytest.mark.parametrize("changes", NEUTRAL, ids=repr)
def test_config_that_leaves_plain_lora_as_it_is_is_read(changes):
    assert read(config(**changes), factors(Q0)).updates[0].target == Q0


REFUSED = [
    ({"peft_type": "HRA"}, "peft_type is"),
    ({"peft_type": None}, "peft_type is missing"),
    ({"use_dora": True}, f"use_dora is true, and {Q0} has no lora_magnitude_vector"),
    ({"use_dora": 1}, "use_dora is 1, expected true or false"),
    ({"bias": "some"}, "bias is 'some', expected 'none', 'all' or 'lora_only'"),
    ({"lora_bias": True}, f"lora_bias is true, and {Q0} has no lora_B.bias"),
    ({"modules_to_save": "score"}, "modules_to_save is 'score', expected a list"),
    ({"modules_to_save": [""]}, "modules_to_save is [''], expected a list"),
    ({"modules_to_save": ["self_attn"]}, "a module that is saved whole"),
    ({"trainable_token_indices": [1]}, "the weights hold no trainable_tokens_delta"),
    ({"trainable_token_indices": [-1]}, "trainable_token_indices is [-1], expected a list"),
    ({"trainable_token_indices": {"wte": 1}}, "trainable_token_indices is {'wte': 1}"),
    ({"layer_replication": [[0, 2]]}, "layer_replication is [[0, 2]]"),
    ({"megatron_config": {"a": 1}}, "layers split by Megatron"),
    ({"use_qalora": True}, "QA-LoRA"),
    ({"use_bdlora": {"nblocks": 2}}, "BD-LoRA"),
    ({"kasa_config": {"beta": 1}}, "KaSA"),
    ({"arrow_config": {"top_k": 3}}, "Arrow"),
    ({"monteclora_config": {"num_samples": 8}}, "MonteCLoRA"),
    ({"target_parameters": "experts.w"}, "target_parameters is 'experts.w', expected"),
    ({"target_parameters": ["experts.w"]}, "the weights hold no such thing"),
    ({"alora_invocation_tokens": ["a"]}, "alora_invocation_tokens is ['a'], expected"),
    ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
    ({"init_lora_weights": "olora"}, "changes the base's weights"),
    ({"init_lora_weights": "loftq"}, "changes the base's weights"),
    ({"a_key_of_next_year": 0.5}, "'a_key_of_next_year' is not known"),
    ({"a_key_of_next_year": "none"}, "'a_key_of_next_year' is not known"),
    ({"enable_lora": [True, False, True]}, "'enable_lora' is not known"),
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
    ({"modules_to_save": ["("]}, "'(' is no regular expression"),
    ({"target_modules": ["q_proj", "k_proj"]}, "lists 'k_proj', and the weights hold no"),
    ({"target_modules": ["proj"]}, "lists 'proj'"),
    ({"target_modules": ".*v_proj"}, "which the config's target_modules"),
    ({"exclude_modules": ["q_proj"]}, "leaves out: PEFT would drop it in silence"),
    ({"layers_to_transform": 1}, "leaves out"),
    ({"layers_to_transform": [0], "layers_pattern": "blocks"}, "leaves out"),
    (
        {"layers_to_transform": [0], "target_modules": ".*q_proj"},
        "PEFT takes it only beside a list of target_modules",
    ),
    (
        {"layers_pattern": "layers"},
        "layers_pattern is 'layers' without layers_to_transform",
    ),
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
P = "base_model.model."
BAD_TENSORS = [
    ({}, "holds no tensors"),
    ({A: ("F32", (2, 6))}, f"{Q0} has no lora_B beside its other factor"),
    ({B: ("F32", (6, 2))}, f"{Q0} has no lora_A"),
    ({A: ("F32", (2, 6)), B: ("F32", (6, 3))}, "expected [rank, in] and [out, rank]"),
    ({A: ("F32", (0, 6)), B: ("F32", (6, 0))}, "expected [rank, in] and [out, rank]"),
    ({A: ("F32", (2, 6, 1)), B: ("F32", (6, 2))}, "expected [rank, in, kernel…]"),
    ({A: ("F32", (2, 6, 3)), B: ("F32", (6, 2, 3))}, "expected [rank, in, kernel…]"),
    ({A: ("F32", (2, 5, 3)), B: ("F32", (6, 1, 1))}, "expected [rank, in, kernel…]"),
    ({A: ("F32", (2,) * 6), B: ("F32", (2,) * 6)}, "expected [rank, in]"),
    ({A: ("F32", (2, 6)), B: ("BF16", (6, 2))}, "the factors are F32 and BF16"),
    ({A: ("I8", (2, 6)), B: ("I8", (6, 2))}, "the factors are I8 and I8"),
    (factors(Q0) | {f"{P}score.weight": ("F32", (2,))}, "modules_to_save names no module"),
    (factors(Q0) | {f"{P}weight": ("F32", (2,))}, "modules_to_save names no module"),
    (factors(Q0) | {f"{P}norm.bias": ("F32", (2,))}, "is the bias of norm, and the"),
    (
        factors(Q0) | {f"{P}{Q0}.base_layer.bias": ("F32", (6,))},
        f"is the bias of the target {Q0}, and the config's bias is 'none'",
    ),
    (factors(Q0) | {"w_a_000": ("F32", (2,))}, "'w_a_000' is not named as PEFT does"),
    ({f"{P}score.weight": ("F32", (2,))}, "the file holds no low-rank factor"),
    (
        factors(Q0) | {f"{P}{Q0}.lora_magnitude_vector": ("F32", (6,))},
        f"{Q0} has a lora_magnitude_vector, and the config's use_dora is not true",
    ),
    (
        factors(Q0) | {f"{P}{Q0}.lora_magnitude_vector": ("F32", (2, 3))},
        "the magnitude is [2, 3], expected [6]",
    ),
    (
        factors(Q0) | {f"{P}{Q0}.lora_B.bias": ("I8", (6,))},
        "the bias is I8, expected one of",
    ),
    (
        factors(Q0) | {f"{P}embed.lora_embedding_A": ("F32", (2, 6))},
        "embed has no lora_B beside its other factor",
    ),
    (
        {A: ("F32", (2, 6)), f"{P}{Q0}.lora_embedding_B": ("F32", (6, 2))},
        "has one factor of an embedding and one of another layer",
    ),
    (factors(Q0) | {f"{P}{Q0}.lora_B.bias": ("F32", (6,))}, "has a lora_B.bias, and"),
    (factors(Q0) | {f"{P}{V0}.lora_B.bias": ("F32", (6,))}, f"{V0} has no lora_A"),
    (factors(Q0) | {f"{P}{Q0}.lora_diag": ("F32", (2,))}, "a diagonal of KaSA"),
    (factors(Q0, f"{Q0}.base_layer"), "the weights hold factors of 2 of its parameters"),
    (factors(f"{Q0}.base_layer.out_proj"), "PEFT's layer for nn.MultiheadAttention"),
    (
        factors(Q0) | factors(Q0, prefix="base_model.model.base_model.model."),
        f"two tensors are factors of {Q0}",
    ),
    ({f"{P}lora_A.weight": ("F32", (2, 6))}, "no low-rank factor"),
    (
        factors(Q0) | {f"{P}lm_head.weight": ("I8", (6, 6))},
        "is I8, expected one of BF16",
    ),
    (
        factors(Q0) | {f"{P}score.original_module.bias": ("F32", (6,))},
        "has original_module in its name and is nobody's copy",
    ),
    (
        factors(Q0) | {f"{P}wte.token_adapter.trainable_tokens_delta": ("F32", (2, 6))},
        "trainable_token_indices has no list for wte",
    ),
    (
        factors(Q0) | {f"{P}wte.token_adapter.base_layer.weight": ("F32", (2, 6))},
        "a whole embedding of which rows are saved too",
    ),
]


@pytest.mark.parametrize(("tensors", "problem"), BAD_TENSORS)
def test_weights_that_are_no_pairs_of_factors_are_refused_by_name(tensors, problem):
    with pytest.raises(FormatError) as error:
        read(config(target_modules=None), tensors)

    assert problem in error.value.problem


ROWS = f"{P}model.embed_tokens.token_adapter.trainable_tokens_delta"
BAD_ROWS = [
    ([1, 2, 3], (2, 6), "the trained rows are [2, 6], and trainable_token_indices names 3"),
    ([1, 1], (2, 6), "names a token twice"),
    ([1], (1,), "the trained rows are [1]"),
    ({"embed_tokens": [1], "tokens": [2]}, (1, 6), "has several lists for"),
    ({"wte": [1]}, (1, 6), "has no list for model.embed_tokens"),
]


@pytest.mark.parametrize(("indices", "shape", "problem"), BAD_ROWS, ids=repr)
def test_rows_that_disagree_with_their_list_are_refused(indices, shape, problem):
    with pytest.raises(FormatError) as error:
        read(config(trainable_token_indices=indices), factors(Q0) | {ROWS: ("F32", shape)})

    assert problem in error.value.problem


def test_every_module_whose_tokens_are_named_has_its_rows():
    tensors = factors(Q0) | {ROWS: ("F32", (2, 6))}
    module = ROWS.removesuffix(".token_adapter.trainable_tokens_delta")
    name = module.rpartition(".")[2]

    with pytest.raises(
        FormatError, match="names tokens of 'lm_head', and the weights hold"
    ):
        read(config(trainable_token_indices={name: [4, 1], "lm_head": [0]}), tensors)
    # Of an output layer that is tied, with the same tokens, PEFT keeps none.
    found = read(config(trainable_token_indices={name: [4, 1], "lm_head": [4, 1]}), tensors)
    assert [one.rows for one in found.replacements] == [(4, 1)]


def test_names_in_trainable_token_indices_are_plain_endings_of_paths():
    source = read(
        config(trainable_token_indices={"tokens": [4, 1]}),
        factors(Q0) | {ROWS: ("F32", (2, 6))},
    )

    (rows,) = source.replacements
    assert (rows.name, rows.role, rows.rows) == (
        "model.embed_tokens.weight",
        "token_delta",
        (4, 1),
    )


def test_several_parameters_of_unknown_order_are_refused():
    tensors = factors("mlp.x", "mlp.x.base_layer", rank=4)

    with pytest.raises(FormatError, match="which of them comes first is not known"):
        read(config(target_modules=[], target_parameters=["x.one", "x.two"]), tensors)


def test_bare_names_of_parameters_mean_those_that_a_module_has():
    tensors = factors("mlp.experts", "mlp.experts.base_layer", "mlp.gate", rank=4)
    names = ["gate_up_proj", "down_proj", "gate.weight"]

    source = read(config(target_modules=[], target_parameters=names), tensors)

    assert [update.target for update in source.updates] == [
        "mlp.experts.down_proj",
        "mlp.experts.gate_up_proj",
        "mlp.gate.weight",
    ]
    first = source.updates[1]
    assert (first.rank, first.experts) == (2, 2)
    assert first.a.name == "base_model.model.mlp.experts.base_layer.lora_A.weight"


def test_experts_whose_factors_are_no_multiple_of_the_rank_are_refused():
    with pytest.raises(FormatError, match="the factors have rank 3"):
        read(
            config(target_modules=[], target_parameters=["experts.w"]),
            factors("mlp.experts", rank=3),
        )


def test_heads_of_a_classifier_are_taken_though_an_older_peft_listed_none():
    head = {f"{P}score.weight": ("F32", (3, 6))}

    source = read(config(task_type="SEQ_CLS", modules_to_save=None), factors(Q0) | head)

    (replaced,) = source.replacements
    assert (replaced.name, replaced.role) == ("score.weight", "modules_to_save")


def test_modules_to_save_means_every_module_whose_path_ends_so():
    names = ("classifier.weight", "pre_classifier.weight", "pre_classifier.bias")
    saved = {f"{P}{name}": ("F32", (6, 6)) for name in names}

    source = read(config(modules_to_save=["classifier"]), factors(Q0) | saved)

    assert [each.name for each in source.replacements] == sorted(names)


def test_older_names_of_magnitudes_and_biases_are_read():
    tensors = factors(Q0) | {
        f"{P}{Q0}.lora_magnitude_vector.weight": ("F32", (6,)),
        f"{P}{Q0}.bias": ("F32", (6,)),
    }

    source = read(config(use_dora=True, bias="lora_only"), tensors)

    assert source.updates[0].magnitude is not None
    assert [(r.name, r.role) for r in source.replacements] == [(f"{Q0}.bias", "bias")]


def test_one_tensor_may_not_be_replaced_twice():
    biases = {f"{P}{Q0}.bias": ("F32", (6,)), f"{P}{Q0}.base_layer.bias": ("F32", (6,))}

    with pytest.raises(FormatError, match="the weights replace"):
        read(config(bias="all"), factors(Q0) | biases)


def test_dora_of_a_convolution_in_groups_is_refused():
    tensors = {
        f"{P}conv.lora_A.weight": ("F32", (2, 4, 3)),
        f"{P}conv.lora_B.weight": ("F32", (6, 1, 1)),
        f"{P}conv.lora_magnitude_vector": ("F32", (1, 6, 1)),
    }

    with pytest.raises(FormatError, match="DoRA of a convolution in groups"):
        read(config(target_modules=["conv"], use_dora=True), tensors)


def test_alora_beside_another_layer_than_linear_is_refused():
    tensors = {
        f"{P}wte.lora_embedding_A": ("F32", (2, 9)),
        f"{P}wte.lora_embedding_B": ("F32", (6, 2)),
    }

    with pytest.raises(FormatError, match="with embedding, wte, which is not read"):
        read(config(target_modules=["wte"], alora_invocation_tokens=[1]), tensors)


def tied(**shapes):
    names = {
        "model.embed_tokens.lora_embedding_A": (2, 9),
        "model.embed_tokens.lora_embedding_B": (6, 2),
        "lm_head.lora_A.weight": (2, 6),
        "lm_head.lora_B.weight": (9, 2),
    }
    return {f"{P}{name}": ("F32", shape) for name, shape in (names | shapes).items()}


def test_tied_updates_that_are_not_one_are_refused():
    tensors = tensor_bytes(tied(), {f"{P}lm_head.lora_A.weight": b"\1" * 48})

    with pytest.raises(FormatError, match="the update of lm_head is not that of"):
        read_peft(
            config(target_modules=["embed_tokens"], ensure_weight_tying=True),
            TensorFile.from_bytes(tensors, where="w"),
            where="adapter",
        )


def test_tied_updates_with_unlike_scalings_are_refused():
    with pytest.raises(FormatError, match="the update of lm_head is not that of"):
        read(
            config(
                target_modules=["embed_tokens"],
                ensure_weight_tying=True,
                alpha_pattern={"embed_tokens": 3},
            ),
            tied(),
        )


def test_dora_of_tied_embeddings_is_refused():
    magnitudes = {
        f"{P}model.embed_tokens.lora_magnitude_vector": ("F32", (6,)),
        f"{P}lm_head.lora_magnitude_vector": ("F32", (9,)),
    }

    with pytest.raises(FormatError, match="DoRA of tied embeddings"):
        read(
            config(
                target_modules=["embed_tokens"], ensure_weight_tying=True, use_dora=True
            ),
            tied() | magnitudes,
        )


def test_whole_embeddings_that_are_tied_and_unequal_are_refused():
    names = {
        f"{P}{module}.weight": ("F32", (9, 6)) for module in ("lm_head", "embed_tokens")
    }
    tensors = tensor_bytes(factors(Q0) | names, {f"{P}lm_head.weight": b"\1" * 216})

    with pytest.raises(FormatError, match=r"lm_head.weight is not embed_tokens.weight"):
        read_peft(
            config(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
            TensorFile.from_bytes(tensors, where="w"),
            where="adapter",
        )


def test_rows_beside_an_update_of_the_same_embedding_are_refused():
    tensors = {
        f"{P}wte.lora_embedding_A": ("F32", (2, 9)),
        f"{P}wte.lora_embedding_B": ("F32", (6, 2)),
        f"{P}wte.token_adapter.trainable_tokens_delta": ("F32", (1, 6)),
    }

    with pytest.raises(FormatError, match=r"rows of wte.weight beside its own update"):
        read(config(target_modules=["wte"], trainable_token_indices=[1]), tensors)


NEITHER_TIES = [
    {"target_modules": ["wte", "q_proj"]},
    {"target_modules": r".*\.(embed_tokens|q_proj)"},
    {"target_modules": ["q_proj"], "modules_to_save": ["wte"]},
    {"target_modules": ["q_proj"]},
]


@pytest.mark.parametrize("said", NEITHER_TIES)
def test_where_peft_ties_nothing_though_asked_nothing_is_tied(said):
    named = said["target_modules"]
    embedding = "model.embed_tokens" if isinstance(named, str) else "transformer.wte"
    tensors = factors(Q0)
    if "wte" in named or isinstance(named, str):
        tensors[f"{P}{embedding}.lora_embedding_A"] = ("F32", (2, 9))
        tensors[f"{P}{embedding}.lora_embedding_B"] = ("F32", (6, 2))
    elif "modules_to_save" in said:
        tensors[f"{P}{embedding}.weight"] = ("F32", (9, 6))

    assert not read(config(ensure_weight_tying=True, **said), tensors).ties_weights


def test_a_bias_beneath_trained_rows_is_the_layers():
    rows = "lm_head.token_adapter"
    tensors = factors(Q0) | {
        f"{P}{rows}.trainable_tokens_delta": ("F32", (1, 6)),
        f"{P}{rows}.base_layer.bias": ("F32", (9,)),
    }

    source = read(config(bias="all", trainable_token_indices={"lm_head": [1]}), tensors)

    assert [(each.name, each.role) for each in source.replacements] == [
        ("lm_head.bias", "bias"),
        ("lm_head.weight", "token_delta"),
    ]


def test_an_entry_for_modules_of_no_layer_is_fine_where_layers_are_chosen():
    said = config(target_modules=["q_proj", "projection"], layers_to_transform=[0])

    assert [update.target for update in read(said, factors(Q0)).updates] == [Q0]
