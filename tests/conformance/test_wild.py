"""What adapters look like that other people made, and what becomes of each.

The folders of tests/assets/wild are as they were found; what these do not show is built
here from an adapter that PEFT saved. Every message is pinned, since it is all that the
person with such a folder gets.
"""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
import transformers

import lora_hub
from lora_hub.errors import FormatError
from lora_hub.formats.detect import detect, open_adapter
from lora_hub.formats.dialect import ReadOptions
from lora_hub.public.converting import convert
from tests import adapters
from tests.builders import tiny_adapter, tiny_gpt2

WILD = Path(__file__).parents[1] / "assets/wild"
MLX = WILD / "mlx-example/0000200_adapters.safetensors"
HOME_MADE = "home-made, without paths of modules: only their author knows what each changes"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def found(path, **how):
    """(rule, place below the folder, message) of every finding."""
    folder = str(path)
    return [
        (each.rule, each.where.removeprefix(folder), each.message)
        for each in lora_hub.validate(path, **how)
    ]


# ── as they were found ───────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("file", "targets", "rank", "scaling"),
    [
        ("gpt-neo-movies/Copy of adapter_model.safetensors", 24, 8, 2.0),
        ("gpt2-chatbot/model.safetensors", 12, 8, 4.0),
    ],
)
def test_weights_under_odd_names_are_read_when_the_file_is_named(
    file, targets, rank, scaling, tmp_path
):
    source = open_adapter(WILD / file)
    convert(WILD / file, "peft", tmp_path / "out")

    assert len(source.updates) == targets
    assert {(u.rank, u.scaling) for u in source.updates} == {(rank, scaling)}
    again = open_adapter(tmp_path / "out")
    assert [(u.target, u.scaling) for u in again.updates] == [
        (u.target, u.scaling) for u in source.updates
    ]


ODD_NAME = "there is no adapter_model.safetensors; another file was read"
FOUND = {
    "gpt-neo-movies": [("LH067", "", ODD_NAME)],
    "gpt2-chatbot": [
        ("LH067", "", ODD_NAME),
        ("LH026", f"/{CONFIG}", "the base is named without its owner"),
    ],
    "mlx-example": [
        (
            "LH021",
            f"/{CONFIG}#/lora_parameters",
            (
                "alpha is 16 and scale 10: MLX-LM today multiplies by scale (10), its "
                "first versions by scale · alpha/rank (20), and nothing here says which "
                "of them trained this"
            ),
        ),
    ],
    "privacy-filter-token-cls": [],
    "sam-w_a-w_b": [
        (
            "LH021",
            "/lora_rank2.safetensors",
            f"the names ('w_a_000', …) are {HOME_MADE}",
        )
    ],
    "peft-types": [("LH021", "", "there is no adapter_config.json: no adapter is here")],
}


def test_what_validation_says_of_each_folder():
    assert {folder.name: found(folder) for folder in WILD.iterdir()} == FOUND


def test_a_classifiers_head_beside_the_factors_is_read(tmp_path):
    source = open_adapter(WILD / "privacy-filter-token-cls")

    held = safetensors.numpy.load_file(WILD / "privacy-filter-token-cls" / WEIGHTS)
    assert {each.name for each in source.replacements} == {
        name.removeprefix("base_model.model.") for name in held if "lora_" not in name
    }
    assert {each.role for each in source.replacements} == {"modules_to_save"}
    assert len(source.updates) * 2 + len(source.replacements) == len(held)


def test_mlx_with_two_numbers_is_asked_about_and_never_guessed():
    with pytest.raises(FormatError) as error:
        open_adapter(MLX)

    assert (
        "scale (10), its first versions by scale · alpha/rank (20)" in error.value.problem
    )
    assert "--scale-from" in error.value.hint


@pytest.mark.parametrize(("said", "scaling"), [("scale", 10.0), ("alpha", 20.0)])
def test_mlx_is_read_when_the_caller_says_which(said, scaling):
    source = open_adapter(MLX, ReadOptions(scale_from=said))

    held = adapters.tensors_of(MLX.read_bytes())
    assert detect(MLX).evidence == (
        "adapter_config.json names fine_tune_type and lora_parameters",
    )
    assert [u.target.split(".")[2] for u in source.updates[::2]] == ["20", "21", "22", "23"]
    for target, delta in adapters.deltas(source).items():
        a, b = (adapters.float64(*held[f"{target}.lora_{which}"]) for which in "ab")
        np.testing.assert_array_equal(delta, scaling * (b.T @ a.T))


def test_every_folder_says_where_it_comes_from_and_its_licence():
    for folder in WILD.iterdir():
        text = (folder / "README.md").read_text()

        assert "Origin: GitHub" in text, folder
        assert "Licence:" in text, folder


def test_the_users_path_was_replaced():
    config = json.loads((WILD / "mlx-example/adapter_config.json").read_text())

    assert config["model"] == "/Users/someone/models/base"


# ── handled ──────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return tiny_adapter(tmp_path_factory.mktemp("plain"))


@pytest.fixture
def folder(plain, tmp_path):
    return Path(shutil.copytree(plain, tmp_path / "adapter"))


def configured(folder, **changes):
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def renamed(folder, rename, **more):
    """Save the weights again, every name as `rename` says, with more tensors."""
    held = safetensors.numpy.load_file(folder / WEIGHTS)
    tensors = {rename(name): tensor for name, tensor in held.items()} | more
    safetensors.numpy.save_file(tensors, folder / WEIGHTS)
    return folder


def classifier(kind, folder, **lora):
    """Save an adapter of a tiny classifier by PEFT."""
    sizes = {
        "llama": {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
        | {"num_attention_heads": 2, "vocab_size": 16, "pad_token_id": 0},
        "distilbert": {"dim": 8, "hidden_dim": 8, "n_layers": 1, "n_heads": 2}
        | {"vocab_size": 16, "max_position_embeddings": 16},
    }
    classes = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForSequenceClassification),
        "distilbert": (
            transformers.DistilBertConfig,
            transformers.DistilBertForSequenceClassification,
        ),
    }
    config_class, model_class = classes[kind]
    torch.manual_seed(0)
    model = model_class(config_class(**sizes[kind]))
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", r=2, **lora))
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return folder


def test_a_head_that_nothing_lists_is_read(tmp_path):
    folder = classifier("llama", tmp_path, target_modules=["q_proj"])

    source = open_adapter(configured(folder, modules_to_save=None))

    assert [each.name for each in source.replacements] == ["score.weight"]


@pytest.mark.parametrize(
    "listed", [["classifier"], ["classifier", "classifier", "no_such_module"], [], None]
)
def test_a_name_in_modules_to_save_means_every_module_that_ends_so(tmp_path, listed):
    folder = classifier(
        "distilbert", tmp_path, target_modules=["q_lin"], modules_to_save=["classifier"]
    )

    source = open_adapter(configured(folder, modules_to_save=listed))

    assert [each.name for each in source.replacements] == [
        "classifier.bias",
        "classifier.weight",
        "pre_classifier.bias",
        "pre_classifier.weight",
    ]


@pytest.mark.parametrize(("bias", "count"), [("all", 13), ("lora_only", 2)])
def test_biases_of_the_base_are_read(tmp_path, bias, count):
    folder = tiny_adapter(
        tmp_path, model=tiny_gpt2(), targets=["c_attn"], bias=bias, fan_in_fan_out=True
    )

    source = open_adapter(folder)

    assert {each.role for each in source.replacements} == {"bias"}
    names = [each.name for each in source.replacements]
    assert len(names) == count
    assert "transformer.h.0.attn.c_attn.bias" in names
    assert not any("base_layer" in name for name in names)


def test_one_name_may_have_several_shapes(tmp_path):
    folder = tiny_adapter(
        tmp_path, model=tiny_gpt2(), targets=["c_proj"], fan_in_fan_out=True
    )

    source = open_adapter(folder)

    assert {(u.b.shape[0], u.a.shape[1]) for u in source.updates} == {(16, 16), (16, 64)}


@pytest.mark.parametrize("said", [True, False, None])
def test_fan_in_fan_out_changes_nothing(folder, said):
    before = adapters.deltas(open_adapter(folder))

    after = adapters.deltas(open_adapter(configured(folder, fan_in_fan_out=said)))

    assert before.keys() == after.keys()
    for target, delta in before.items():
        np.testing.assert_array_equal(delta, after[target])


def test_an_adapter_on_top_of_a_peft_model_is_for_the_same_modules(folder):
    before = open_adapter(folder)

    renamed(folder, lambda name: f"base_model.model.{name}")
    after = open_adapter(folder)

    assert [u.target for u in after.updates] == [u.target for u in before.updates]


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_alpha": 16.5},
        {"lora_dropout": 0},
        {"task_type": "FEATURE_EXTRACTION"},
        {"auto_mapping": {"base_model_class": "X", "parent_library": "y", "more": 1}},
        {"enable_lora": None, "merge_weights": False},
        {"a_key_of_tomorrow": None, "another": [], "third": {}, "fourth": False},
    ],
)
def test_a_config_with_odd_but_harmless_values_is_read(folder, changes):
    assert found(configured(folder, **changes)) == []


def test_a_target_with_a_dot_means_whole_parts(folder):
    def rename(name):
        return name.replace("self_attn.q_proj", "to_out.0")

    assert (
        found(configured(renamed(folder, rename), target_modules=["to_out.0", "v_proj"]))
        == []
    )
    assert found(configured(folder, target_modules=["out.0", "v_proj"])) == [
        (
            "LH021",
            f"/{CONFIG}",
            "target_modules lists 'out.0', and the weights hold no such module",
        )
    ]


def test_several_adapters_in_a_folder_are_named(tmp_path):
    for name in ("first", "second"):
        shutil.copyfile(MLX, tmp_path / f"{name}.safetensors")

    names = "'first.safetensors' (MLX-LM), 'second.safetensors' (MLX-LM)"
    assert found(tmp_path) == [("LH021", "", f"there are several adapters: {names}")]


# ── warned about ─────────────────────────────────────────────────────────────────────

LOCAL = "/home/someone/models/llama"


@pytest.mark.parametrize(
    ("changes", "rule", "message"),
    [
        (
            {"bias": "lora_only"},
            "LH064",
            "bias is 'lora_only', and no bias is in the weights",
        ),
        (
            {"base_model_name_or_path": LOCAL},
            "LH024",
            "the base is named by a local path",
        ),
        (
            {"base_model_name_or_path": "unsloth/llama-3-8b-bnb-4bit"},
            "LH025",
            "the base is a quantised copy of another model",
        ),
        (
            {"base_model_name_or_path": "gpt2"},
            "LH026",
            "the base is named without its owner",
        ),
        ({"base_model_name_or_path": None}, "LH024", "the adapter names no base"),
        ({"revision": "main"}, "LH027", "the revision is 'main'"),
    ],
)
def test_what_a_config_leaves_in_doubt_is_warned_about(folder, changes, rule, message):
    configured(folder, **changes)

    assert found(folder) == [(rule, f"/{CONFIG}", message)]
    assert len(open_adapter(folder).updates) == 4


# ── refused ──────────────────────────────────────────────────────────────────────────

POINTER = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:"
    + b"0" * 64
    + b"\nsize 12345\n"
)
XLORA = "X-LoRA: a classifier mixes adapters for every token"
ADAPTERHUB = {"config": {"original_ln_after": True}, "hidden_size": 8, "model_type": "bert"}


def written(folder, name, data):
    (folder / name).write_bytes(
        data if isinstance(data, bytes) else json.dumps(data).encode()
    )
    return folder


@pytest.mark.parametrize(
    ("name", "data", "rule", "message"),
    [
        (WEIGHTS, POINTER, "LH013", "this is a Git LFS pointer to a file of 12,345 bytes"),
        (CONFIG, POINTER, "LH013", "this is a Git LFS pointer to a file of 12,345 bytes"),
        (
            "README.md",
            POINTER,
            "LH013",
            "this is a Git LFS pointer to a file of 12,345 bytes",
        ),
        (
            WEIGHTS,
            b"{}",
            "LH020",
            "the file has 2 bytes, a safetensors file has at least 10",
        ),
        ("training_args.bin", b"\x80\x02}q\x00.", "LH023", "this is a pickle"),
        ("checkpoint/optimizer.pt", b"PK\x03\x04", "LH023", "this is a pickle"),
        (CONFIG, ADAPTERHUB, "LH021", "the config is AdapterHub's, which is not read"),
        (
            CONFIG,
            {"lora_rank": 8},
            "LH021",
            "the config is none that is known: it names no peft_type",
        ),
        (
            CONFIG,
            {"peft_type": "XLORA", "base_model_name_or_path": "org/base"},
            "LH021",
            f"peft_type is 'XLORA' ({XLORA}), which is not read",
        ),
    ],
)
def test_what_is_no_adapter_is_refused_by_name(folder, name, data, rule, message):
    (folder / name).parent.mkdir(exist_ok=True)
    whole = data if isinstance(data, bytes) else json.dumps(data).encode()
    (folder / name).write_bytes(whole)

    assert found(folder) == [(rule, f"/{name}", message)]


UNET = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


def sd_scripts(folder, name):
    tensors = {
        f"{name}.lora_down.weight": np.ones((2, 8), np.float32),
        f"{name}.lora_up.weight": np.ones((8, 2), np.float32),
    }
    safetensors.numpy.save_file(tensors, folder / "lora.safetensors")
    return folder / "lora.safetensors", adapters.pipeline_base(folder / "base")


def test_a_broken_conversion_is_refused_by_name(tmp_path):
    name = UNET.replace("lora_unet", "lora_unet_unet")
    file, base = sd_scripts(tmp_path, name)

    with pytest.raises(FormatError) as error:
        convert(file, "peft", tmp_path / "out", base=base)

    assert error.value.problem == (
        f"the base {base} has no layer that sd-scripts would call {name}"
    )
    assert not (tmp_path / "out").exists()


def test_sd_scripts_without_alphas_scale_by_one(tmp_path):
    file, base = sd_scripts(tmp_path, UNET)

    source = open_adapter(file, ReadOptions(base=base))

    assert [update.scaling for update in source.updates] == [1.0]


@pytest.mark.parametrize(
    ("factor", "rule", "message"),
    [
        (0.0, "LH031", "every factor b is zero throughout"),
        (np.nan, "LH030", "32 of 32 numbers are NaN or infinite"),
    ],
)
def test_factors_that_say_nothing_are_told(folder, factor, rule, message):
    held = safetensors.numpy.load_file(folder / WEIGHTS)
    tensors = {
        name: tensor * np.float32(factor) if "lora_B" in name else tensor
        for name, tensor in held.items()
    }
    safetensors.numpy.save_file(tensors, folder / WEIGHTS)

    told = {(each[0], each[2]) for each in found(folder)}
    assert (rule, message) in told
    assert {each[0] for each in told} == {rule}


def test_one_target_without_change_is_told_and_read(folder):
    held = safetensors.numpy.load_file(folder / WEIGHTS)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    safetensors.numpy.save_file(held | {name: held[name] * 0}, folder / WEIGHTS)

    assert ("LH032", f"/{WEIGHTS}") in [each[:2] for each in found(folder)]
    assert len(open_adapter(folder).updates) == 4


def test_a_recorded_hash_of_nothing_is_told(folder):
    held = safetensors.numpy.load_file(folder / WEIGHTS)
    lies = {"sshs_model_hash": hashlib.sha256(b"").hexdigest()}
    safetensors.numpy.save_file(held, folder / WEIGHTS, metadata=lies)

    assert found(folder) == [
        (
            "LH028",
            f"/{WEIGHTS}: __metadata__.sshs_model_hash",
            "the recorded hash is the SHA-256 of nothing",
        )
    ]
