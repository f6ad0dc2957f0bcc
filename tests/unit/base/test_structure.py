"""Do names and shapes of an adapter agree with a base? Every kind of layer is told."""

import json

import pytest
import torch
from safetensors.torch import save_file

from lora_hub.base.folder import FolderBase, describe
from lora_hub.base.structure import check_structure
from lora_hub.errors import FitError
from lora_hub.formats.source import (
    AdapterSource,
    Replacement,
    ScaleSource,
    UpdateSource,
)
from lora_hub.tensors.file import TensorFile
from lora_hub.tensors.header import TensorInfo
from tests.builders import tensor_bytes

NOTHING = TensorFile.from_bytes(tensor_bytes({}), where="adapter")

TENSORS = {
    "model.embed_tokens.weight": (32, 4),
    "model.layers.0.q_proj.weight": (6, 4),
    "model.layers.0.q_proj.bias": (6,),
    "model.layers.0.norm.weight": (4,),
    "model.layers.0.conv.weight": (8, 2, 3, 5),
    "model.layers.0.grouped.weight": (8, 2, 3),
    "model.layers.0.mlp.experts.gate_up_proj": (3, 10, 4),
    "model.layers.0.attn.c_attn.weight": (4, 12),
    "model.layers.0.shared_expert.up_proj.weight": (6, 4),
    "score.weight": (2, 4),
}


def base(folder, tensors=TENSORS, **config):
    folder.mkdir()
    save_file(
        {name: torch.zeros(shape) for name, shape in tensors.items()},
        folder / "model.safetensors",
    )
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def info(*shape):
    return TensorInfo("t", "F32", shape, 0, 0)


def update(target, a, b, *, rank=2, **more):
    return UpdateSource(target, rank, 4.0, "alpha/r", info(*a), info(*b), **more)


def source(*parts):
    return AdapterSource(
        updates=tuple(part for part in parts if isinstance(part, UpdateSource)),
        tensors=NOTHING,
        scales=tuple(part for part in parts if isinstance(part, ScaleSource)),
        replacements=tuple(part for part in parts if isinstance(part, Replacement)),
    )


Q = "model.layers.0.q_proj"
EMBED = "model.embed_tokens"
CONV = "model.layers.0.conv"
EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"
HEAD = update("lm_head", (2, 4), (32, 2))
PLAIN = update(Q, (2, 4), (6, 2))
DORA = update(Q, (2, 4), (6, 2), magnitude=info(6))
BIASED = update(Q, (2, 4), (6, 2), bias=info(6))
EMBEDDED = update(EMBED, (2, 32), (4, 2), layer="embedding", magnitude=info(4))
CONVOLVED = update(
    CONV, (2, 2, 3, 5), (8, 2, 1, 1), layer="conv", magnitude=info(1, 8, 1, 1)
)
GROUPED = update("model.layers.0.grouped", (4, 8, 3), (8, 1, 1), rank=4, layer="conv")
FUSED = update(EXPERTS, (6, 4), (10, 6), layer="experts")
ROWS = ScaleSource(Q, "rows", info(6))
COLUMNS = ScaleSource(Q, "columns", info(4))
SCORE = Replacement("score.weight", "modules_to_save", info(2, 4))
NEW = Replacement("classifier.weight", "modules_to_save", info(2, 4))
TOKENS = Replacement("model.embed_tokens.weight", "token_delta", info(2, 4), (3, 31))
BIAS = Replacement(f"{Q}.bias", "bias", info(6))


@pytest.mark.parametrize(
    ("part", "weights"),
    [
        (PLAIN, [f"{Q}.weight"]),
        (DORA, [f"{Q}.weight"]),
        (BIASED, [f"{Q}.bias", f"{Q}.weight"]),
        (EMBEDDED, [f"{EMBED}.weight"]),
        (CONVOLVED, [f"{CONV}.weight"]),
        (GROUPED, ["model.layers.0.grouped.weight"]),
        (FUSED, [EXPERTS]),
        (ROWS, [f"{Q}.bias", f"{Q}.weight"]),
        (COLUMNS, [f"{Q}.weight"]),
        (SCORE, ["score.weight"]),
        (TOKENS, ["model.embed_tokens.weight"]),
        (BIAS, [f"{Q}.bias"]),
        (HEAD, ["lm_head.weight"]),
    ],
)
def test_what_fits_tells_the_tensors_that_change(tmp_path, part, weights):
    with FolderBase.open(base(tmp_path / "base")) as view:
        found = check_structure(source(part), view)

    assert list(found.weights) == weights
    assert found.new == ()


def test_conv1d_of_gpt2_is_compared_as_it_is_stored(tmp_path):
    part = update("model.layers.0.attn.c_attn", (2, 4), (12, 2))

    with FolderBase.open(base(tmp_path / "gpt2", model_type="gpt2")) as view:
        check_structure(source(part), view)
    with FolderBase.open(base(tmp_path / "llama", model_type="llama")) as view:
        with pytest.raises(FitError) as caught:
            check_structure(source(part), view)
        assert "c_attn.weight is 4×12, the adapter's delta is 12×4" in str(caught.value)


def test_a_head_that_the_base_lacks_is_new(tmp_path):
    with FolderBase.open(base(tmp_path / "base")) as view:
        found = check_structure(source(PLAIN, NEW), view)

    assert found.new == ("classifier.weight",)
    assert "classifier.weight" not in found.weights


def test_an_adapter_of_which_nothing_is_in_the_base_is_refused(tmp_path):
    with (
        FolderBase.open(base(tmp_path / "base")) as view,
        pytest.raises(FitError, match="none of the 1 tensors it brings is in the base"),
    ):
        check_structure(source(NEW), view)


def test_an_update_of_a_new_head_is_compared_with_the_new_head(tmp_path):
    fits = update("classifier", (2, 4), (2, 2))
    wrong = update("classifier", (2, 4), (3, 2))

    with FolderBase.open(base(tmp_path / "base")) as view:
        found = check_structure(source(PLAIN, fits, NEW), view)
        with pytest.raises(FitError, match="delta is 3×4"):
            check_structure(source(PLAIN, wrong, NEW), view)

    assert found.weights == (f"{Q}.weight",)


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        (update("lm", (2, 4), (6, 2)), "lm.weight does not exist"),
        (update(Q, (2, 5), (6, 2)), f"{Q}.weight is 6×4, the adapter's delta is 6×5"),
        (update("model.layers.0.norm", (2, 4), (4, 2)), "is 4, the adapter's delta is 4×4"),
        (update(Q, (2, 4), (6, 2), rank=3), f"factors of {Q} are 2×4 and 6×2, expected"),
        (update(Q, (3, 4), (6, 2)), "are 3×4 and 6×2, expected rank 2"),
        (update(Q, (2, 4, 1), (6, 2)), "are 2×4×1 and 6×2, expected rank 2"),
        (
            update(Q, (2, 4), (6, 2), magnitude=info(4)),
            f"the magnitude of {Q} has 4 numbers, its layer 6 outputs",
        ),
        (
            update(Q, (2, 4), (6, 2), bias=info(7)),
            f"the bias of {Q} has 7 numbers, its layer 6 outputs",
        ),
        (
            update(EMBED, (2, 4), (32, 2), layer="embedding"),
            "embed_tokens.weight is 32×4, the adapter's delta is 4×32",
        ),
        (
            update(EMBED, (2, 40), (4, 2), layer="embedding"),
            "resizing the vocabulary from 32 to 40: model.embed_tokens.weight",
        ),
        (
            # Other rows than in the base, and no row of it is a word's.
            update("model.layers.0.shared_expert.up_proj", (2, 4), (8, 2)),
            "shared_expert.up_proj.weight is 6×4, the adapter's delta is 8×4",
        ),
        (
            update(CONV, (2, 2, 5, 3), (8, 2, 1, 1), layer="conv"),
            "conv.weight is 8×2×3×5, the adapter's delta is 8×2×5×3",
        ),
        (
            update(CONV, (2, 2, 3, 5), (8, 2, 3, 1), layer="conv"),
            "are 2×2×3×5 and 8×2×3×1, expected rank 2",
        ),
        (
            update("model.layers.0.grouped", (4, 4, 3), (8, 1, 1), rank=4, layer="conv"),
            "grouped.weight is 8×2×3, the adapter's delta is 8×1×3",
        ),
        (
            update(EXPERTS, (4, 4), (10, 4), layer="experts"),
            "gate_up_proj is 3×10×4, the adapter's delta is 2×10×4",
        ),
        (update(EXPERTS, (5, 4), (10, 5), layer="experts"), "are 5×4 and 10×5, expected"),
        (ScaleSource(Q, "rows", info(4)), f"{Q} has 6 outputs, the adapter scales 4"),
        (ScaleSource(Q, "columns", info(6)), f"{Q} has 4 inputs, the adapter scales 6"),
        (ScaleSource("gone", "rows", info(4)), "gone.weight does not exist"),
        (
            Replacement("score.weight", "modules_to_save", info(3, 4)),
            "score.weight is 2×4, the new one is 3×4",
        ),
        (
            Replacement("model.embed_tokens.weight", "embedding", info(34, 4)),
            "the adapter was trained after resizing the vocabulary from 32 to 34",
        ),
        (
            Replacement("model.embed_tokens.weight", "token_delta", info(1, 4), (32,)),
            "row 32 of model.embed_tokens.weight, which has 32 rows: it was trained after",
        ),
        (
            Replacement("model.embed_tokens.weight", "token_delta", info(1, 5), (0,)),
            "the new rows of model.embed_tokens.weight are 1×5, expected 1×4",
        ),
        (Replacement("gone.bias", "bias", info(4)), "gone.bias does not exist"),
        (Replacement("gone.weight", "token_delta", info(1, 4), (0,)), "gone.weight does"),
    ],
)
def test_what_does_not_fit_is_listed_with_its_reason(tmp_path, part, reason):
    missing = update("model.missing", (2, 4), (6, 2))

    with (
        FolderBase.open(base(tmp_path / "base")) as view,
        pytest.raises(FitError) as caught,
    ):
        check_structure(source(PLAIN, part, missing), view)

    assert caught.value.problem.startswith("2 of 3 targets do not fit the base: ")
    assert sum(reason in one for one in caught.value.reasons) == 1
    assert "model.missing.weight does not exist" in caught.value.reasons


def test_a_head_tied_to_the_embedding_is_where_the_embedding_is(tmp_path):
    with FolderBase.open(base(tmp_path / "base", tie_word_embeddings=True)) as view:
        found = check_structure(source(HEAD), view)
        described = describe(view, ["lm_head"])

    assert found.places["lm_head.weight"].parts == ("model.embed_tokens.weight",)
    assert [target.name for target in described.targets] == ["lm_head.weight"]
    assert described.targets[0].shape == (32, 4)


def test_an_untied_base_without_a_head_has_none(tmp_path):
    with (
        FolderBase.open(base(tmp_path / "base", tie_word_embeddings=False)) as view,
        pytest.raises(FitError, match="does not exist"),
    ):
        check_structure(source(HEAD), view)


def test_a_base_saved_without_its_prefix_is_found(tmp_path):
    bare = {name.removeprefix("model."): shape for name, shape in TENSORS.items()}
    longer = {f"bert.{name}": shape for name, shape in TENSORS.items()}

    for name, tensors in (("bare", bare), ("longer", longer)):
        with FolderBase.open(base(tmp_path / name, tensors)) as view:
            found = check_structure(source(PLAIN), view)
            assert found.weights == (f"{Q}.weight",)
            assert view.digest(found.places[f"{Q}.weight"].parts[0]) is not None


def head(name, *shape):
    return Replacement(name, "modules_to_save", info(*shape))


@pytest.mark.parametrize(
    ("replaced", "reason"),
    [
        (
            [head("model.layers.0.q_proj.weight", 6, 4)],
            "model.layers.0.q_proj.weight anew and not model.layers.0.q_proj.bias",
        ),
        (
            [head("score.weight", 2, 4), head("score.bias", 2)],
            "score.bias does not exist, and score.weight does",
        ),
        (
            [head("score.weight", 2, 4), head("score.weight.extra", 2)],
            "score.weight.extra does not exist, and score.weight does",
        ),
        (
            [head("score.weight", 2, 4), head("score.lora_C.weight", 2)],
            "score.lora_C.weight does not exist, and score.weight does",
        ),
    ],
)
def test_a_layer_saved_whole_holds_what_the_bases_own_does(tmp_path, replaced, reason):
    with (
        FolderBase.open(base(tmp_path / "base")) as view,
        pytest.raises(FitError) as error,
    ):
        check_structure(source(*replaced), view)

    assert any(reason in one for one in error.value.reasons)
