"""Does the adapter fit the base? Each wrong base is told apart from the others."""

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_hub.base.fit import check_fit
from lora_hub.base.folder import FolderBase, describe
from lora_hub.base.view import root_of
from lora_hub.errors import FitError
from lora_hub.manifest.document import BaseHint, BaseVariant

MODULES = [f"model.layers.{n}.self_attn.{p}_proj" for n in range(3) for p in "qv"]
FIRST = "model.layers.0.self_attn.q_proj.weight"
POLICIES = ["struct", "targets", "exact"]


@pytest.fixture
def recorded(make_base):
    """Return what a manifest says about the right base."""
    with FolderBase.open(make_base("right")) as view:
        base = describe(view, MODULES)
    return msgspec.structs.replace(
        base, hints=(BaseHint(hub="hf", repo="org/right", revision="main"),)
    )


def fit(recorded, folder, policy=None):
    with FolderBase.open(folder) as view:
        return check_fit(recorded, view, policy=policy)


def misfit(recorded, folder, policy=None):
    with FolderBase.open(folder) as view, pytest.raises(FitError) as caught:
        check_fit(recorded, view, policy=policy)
    assert caught.value.where == str(folder)
    assert caught.value.hint is not None
    assert "org/right" in caught.value.hint
    assert caught.value.reasons
    assert caught.value.exit_code == 3
    return caught.value


def test_the_same_base_fits_under_every_policy(recorded, make_base):
    same = make_base("same", shards=4)

    found = {policy: fit(recorded, same, policy) for policy in POLICIES}

    assert (found["targets"].checked, found["targets"].total) == (6, 6)
    assert (found["exact"].checked, found["exact"].total) == (10, 10)
    assert found["targets"].note == found["exact"].note == ""
    assert (found["struct"].checked, found["struct"].total) == (0, 6)
    assert found["struct"].note == "names and shapes were compared, weights were not"


def test_the_manifest_chooses_the_policy_unless_the_caller_does(recorded, make_base):
    same = make_base("same")
    strict = msgspec.structs.replace(recorded, policy="exact")

    assert fit(recorded, same).policy == "targets"
    assert fit(strict, same).policy == "exact"
    assert fit(strict, same, "struct").policy == "struct"


@pytest.mark.parametrize("policy", ["targets", "exact"])
def test_other_weights_of_equal_shapes_do_not_fit(recorded, make_base, policy):
    error = misfit(recorded, make_base("other", seed=1), policy)

    assert error.problem.startswith(
        "the base holds other weights: 6 of 6 targeted tensors differ, "
        f"first {FIRST} is sha256:"
    )
    assert error.problem.endswith(f", expected {recorded.targets[0].sha256}")


@pytest.mark.parametrize("policy", POLICIES)
def test_a_base_with_fewer_layers_does_not_fit(recorded, make_base, policy):
    error = misfit(recorded, make_base("short", layers=1), policy)

    assert error.problem == (
        "the base has 1 layers, the adapter was made for 3; 4 of 6 targets do not exist, "
        "first model.layers.1.self_attn.q_proj.weight"
    )
    assert len(error.reasons) == 2


@pytest.mark.parametrize("policy", ["targets", "exact"])
def test_a_copy_in_float16_does_not_fit(recorded, make_base, policy):
    error = misfit(recorded, make_base("half", dtype=torch.float16), policy)

    assert error.problem == (
        "the base holds F16, the adapter was made on BF16; 6 of 6 targets differ, "
        f"first {FIRST}"
    )
    assert error.hint == (
        "the adapter was made on hf:org/right@main; load it in BF16, or widened to F32 "
        "or F64"
    )


@pytest.mark.parametrize("policy", POLICIES)
def test_another_architecture_does_not_fit(recorded, make_base, policy):
    other = make_base(
        "gpt", prefix="transformer.", model_type="gpt2", architectures=["GPT2LMHeadModel"]
    )

    error = misfit(recorded, other, policy)

    assert error.problem == (
        "the base is another architecture, gpt2 (GPT2LMHeadModel), the adapter was made "
        "for llama (LlamaForCausalLM); none of the 6 targets exists in the base, "
        f"first {FIRST}"
    )


@pytest.mark.parametrize("policy", POLICIES)
def test_a_base_of_other_width_does_not_fit(recorded, make_base, policy):
    error = misfit(recorded, make_base("wide", hidden=16), policy)

    assert error.problem == (
        f"6 of 6 targets have another shape, first {FIRST} is 16×16, expected 8×8"
    )


def test_an_architecture_of_equal_names_and_shapes_is_told_from_weights(
    recorded, make_base
):
    other = make_base("mistral", seed=1, model_type="mistral", architectures=["M"])

    by_shape, by_weight = (misfit(recorded, other, p) for p in ("struct", "targets"))

    assert by_shape.problem == (
        "the base is another architecture, mistral (M), the adapter was made for llama "
        "(LlamaForCausalLM)"
    )
    assert by_weight.reasons[0] == by_shape.problem
    assert "6 of 6 targeted tensors differ" in by_weight.reasons[1]


def test_the_tensors_decide_and_not_what_the_config_says(recorded, make_base):
    renamed = make_base("renamed", model_type="llama-like", num_hidden_layers=99)

    assert fit(recorded, renamed, "targets").checked == 6


def test_another_head_on_the_same_model_type_is_the_same_architecture(recorded, make_base):
    classifier = make_base("classifier", architectures=["LlamaForSequenceClassification"])

    assert fit(recorded, classifier, "struct").total == 6


def test_a_base_without_a_config_is_judged_by_its_tensors(recorded, make_base):
    bare = make_base("bare", prefix="transformer.")
    (bare / "config.json").unlink()

    assert misfit(recorded, bare).problem == (
        f"none of the 6 targets exists in the base, first {FIRST}"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("policy", ["targets", "exact"])
def test_weights_widened_exactly_fit(recorded, make_base, policy, dtype):
    found = fit(recorded, make_base("wide", dtype=dtype), policy)

    held = "F32" if dtype == torch.float32 else "F64"
    assert found.note == (
        f"the base is held in {held}, into which the recorded BF16 weights were widened "
        "exactly"
    )
    assert found.checked == found.total


def test_weights_changed_after_widening_do_not_fit(recorded, make_base):
    wide = make_base("wide", dtype=torch.float32)
    path = wide / "model.safetensors"
    weights = load_file(path)
    weights[FIRST][0, 0] = 1 / 3
    save_file(weights, path)

    error = misfit(recorded, wide)

    assert error.problem == (
        "the base holds other weights: 1 of 6 targeted tensors differ, "
        f"first {FIRST} holds values that BF16 does not have"
    )


def test_exact_hashes_a_widened_base_in_the_recorded_dtype_alone(recorded, make_base):
    """Its bytes as they are held cannot be the recorded ones, and have twice the size."""
    asked = []

    class Noting(FolderBase):
        def digest(self, name, as_dtype=None):
            asked.append((name, as_dtype))
            return super().digest(name, as_dtype)

    with Noting.open(make_base("wide", dtype=torch.float32)) as view:
        found = check_fit(recorded, view, policy="exact")
        names = set(view.tensors)

    assert found.checked == len(names)
    assert sorted(asked) == sorted((name, "BF16") for name in names)


def test_a_value_that_was_not_widened_beside_the_targets_is_told(recorded, make_base):
    folder = make_base("wide", dtype=torch.float32)
    path = folder / "model.safetensors"
    held = load_file(path)
    held["model.embed_tokens.weight"][0, 0] = 1 + 2**-12
    save_file(held, path)

    assert fit(recorded, folder, "targets").policy == "targets"
    assert misfit(recorded, folder, "exact").problem == (
        "the targeted tensors are those recorded, others are not: one holds values that "
        "BF16 does not have"
    )


def test_a_change_beside_the_targets_matters_to_exact_alone(recorded, make_base):
    beside = make_base("beside", change=("model.embed_tokens.weight",))

    error = misfit(recorded, beside, "exact")

    assert fit(recorded, beside, "targets").checked == 6
    assert error.problem.startswith(
        "the targeted tensors are those recorded, others are not: the root is sha256:"
    )


def test_tensors_beside_the_targets_matter_to_exact_alone(recorded, make_base):
    longer = make_base("longer", layers=4)

    error = misfit(recorded, longer, "exact")

    assert error.reasons[0] == "the base has 4 layers, the adapter was made for 3"
    assert error.reasons[1].startswith("the base has other tensors beside the targets")


def test_the_four_wrong_bases_have_four_messages(recorded, make_base):
    problems = {
        misfit(recorded, folder).problem
        for folder in (
            make_base("weights", seed=1),
            make_base("layers", layers=2),
            make_base("dtype", dtype=torch.float16),
            make_base("gpt", prefix="h.", model_type="gpt2"),
        )
    }

    assert len({problem.split(",")[0] for problem in problems}) == 4


def test_a_variant_that_the_author_allows_fits(recorded, make_base):
    half = make_base("half", dtype=torch.float16)
    with FolderBase.open(half) as view:
        root = root_of(view)
    assert root is not None
    variant = BaseVariant(root=root, relation="cast-of", dtype="F16")
    allowed = msgspec.structs.replace(recorded, variants=(variant,))

    found = fit(allowed, half)

    assert found.note == (
        "the base is the variant F16 (cast-of) that the adapter allows, not tested by its "
        "author"
    )
    assert "other weights" in misfit(allowed, make_base("other", seed=1)).problem


def test_without_hints_the_root_says_which_base_is_meant(recorded, make_base):
    nameless = msgspec.structs.replace(recorded, hints=())

    with (
        FolderBase.open(make_base("other", seed=1)) as view,
        pytest.raises(FitError) as caught,
    ):
        check_fit(nameless, view)

    assert caught.value.hint == f"the adapter was made on the base of root {recorded.root}"


class Unread(FolderBase):
    """A base whose weights must not be read."""

    def digest(self, name, as_dtype=None):
        raise AssertionError(name)


@pytest.mark.parametrize(
    "change",
    [{"dtype": torch.float16}, {"hidden": 16}, {"layers": 1}, {"prefix": "h."}],
)
def test_nothing_is_hashed_where_names_shapes_or_dtypes_differ(recorded, make_base, change):
    with Unread.open(make_base("wrong", **change)) as view, pytest.raises(FitError):
        check_fit(recorded, view, policy="exact")


def test_a_base_of_another_vocabulary_is_told_as_such(make_base):
    name = "model.embed_tokens.weight"
    right, resized = make_base("right"), make_base("resized")
    with FolderBase.open(right) as view:
        base = describe(view, [], also=[name, "model.layers.0.norm.weight"])
    path = resized / "model.safetensors"
    weights = load_file(path)
    weights[name] = torch.cat([weights[name], weights[name][:2]])
    save_file(weights, path)

    with FolderBase.open(resized) as view, pytest.raises(FitError) as caught:
        check_fit(base, view)

    assert caught.value.problem == (
        "1 of 2 targets have another shape, first model.embed_tokens.weight is 13×8, "
        "expected 11×8: the vocabulary was resized, here or before the training"
    )
