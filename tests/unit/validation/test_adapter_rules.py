"""What real adapters have wrong with them, one rule a test."""

import hashlib
import json
import shutil

import numpy as np
import pytest

from lora_hub import canonical, digest
from lora_hub.tensors.file import TensorFile
from lora_hub.tensors.write import chunks_of
from lora_hub.validation.run import validate
from tests import packages

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """An adapter with ten targets of one kind, all alike."""
    folder = tmp_path_factory.mktemp("rules") / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(
        json.dumps(
            {
                "base_model_name_or_path": "tiny-lab/tiny",
                "lora_alpha": 8,
                "peft_type": "LORA",
                "r": 4,
                "target_modules": ["q_proj"],
            }
        )
    )
    numbers = np.random.default_rng(0)
    save(
        folder,
        {
            f"base_model.model.model.layers.{layer}.q_proj.lora_{factor}.weight": (
                numbers.normal(size=shape).astype("f4")
            )
            for layer in range(10)
            for factor, shape in (("A", (4, 16)), ("B", (16, 4)))
        },
    )
    return folder


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "adapter")


def save(folder, arrays, metadata=None):
    specs = [(name, "F32", array.shape) for name, array in arrays.items()]
    data = b"".join(
        bytes(chunk)
        for chunk in chunks_of(
            specs, lambda name: (arrays[name].tobytes(),), metadata or {}
        )
    )
    (folder / WEIGHTS).write_bytes(data)


def load(folder):
    with TensorFile.open(folder / WEIGHTS) as file:
        return {
            name: np.frombuffer(file.read(name), "<f4").reshape(info.shape).copy()
            for name, info in file.header.tensors.items()
        }


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def factor(layer, which):
    return f"base_model.model.model.layers.{layer}.q_proj.lora_{which}.weight"


def found(folder):
    return [(one.rule, one.severity) for one in validate(folder)]


def test_the_adapter_itself_has_no_findings(folder):
    assert validate(folder) == ()


# ── the base's name ──────────────────────────────────────────────────────────────────

NAMES = {
    "/home/someone/llama": "LH024",
    "./llama": "LH024",
    "C:\\models\\llama": "LH024",
    "D:/models": "LH024",
    "models/checkpoints/llama": "LH024",
    " ": "LH024",
    "unsloth/Llama-3.2-1B-bnb-4bit": "LH025",
    "unsloth/qwen2.5-7b-unsloth-bnb-4bit": "LH025",
    "TheBloke/Llama-2-7B-GPTQ": "LH025",
    "Qwen/Qwen2-7B-Instruct-GPTQ-Int4": "LH025",
    "org/model-AWQ": "LH025",
    "mlx-community/Mistral-7B-4bit": "LH025",
    "org/model-FP8": "LH025",
    "gpt2": "LH026",
}


@pytest.mark.parametrize("name", NAMES)
def test_name_of_a_base_that_others_cannot_use_is_a_warning(name, folder):
    edit(folder, base_model_name_or_path=name)

    assert found(folder) == [(NAMES[name], "warning")]


@pytest.mark.parametrize("name", ["a/b", "org/awqward", "org/bits-8b", "org/int8ly"])
def test_name_with_an_owner_is_fine(name, folder):
    edit(folder, base_model_name_or_path=name)

    assert found(folder) == []


@pytest.mark.parametrize("revision", ["main", "unsloth", "deadbeef", "G" * 40])
def test_revision_that_is_no_commit_is_a_warning(revision, folder):
    edit(folder, revision=revision)

    assert found(folder) == [("LH027", "warning")]


def test_revision_that_is_a_commit_is_fine(folder):
    edit(folder, revision="0123456789" * 4)

    assert found(folder) == []


def test_base_is_looked_at_where_the_adapter_itself_cannot_be_read(folder):
    edit(folder, base_model_name_or_path="gpt2", novel_method="yes")

    assert found(folder) == [("LH021", "error"), ("LH026", "warning")]


# ── what lies in the folder ──────────────────────────────────────────────────────────

POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n"
    "size 6832600\n"
)


@pytest.mark.parametrize("name", [WEIGHTS, "adapter_config.json", "README.md"])
def test_lfs_pointer_is_named_with_the_size_it_declares(name, folder):
    (folder / name).write_text(POINTER)

    (one,) = validate(folder)

    assert (one.rule, one.severity) == ("LH013", "error")
    assert one.where == f"{folder}/{name}"
    assert one.message == "this is a Git LFS pointer to a file of 6,832,600 bytes"
    assert "git lfs pull" in one.hint


def test_pickles_are_found_wherever_they_lie_and_whatever_they_are_called(folder):
    (folder / "checkpoint-500").mkdir()
    (folder / "checkpoint-500" / "optimizer.pt").touch()
    (folder / "notes.txt").write_bytes(b"\x80\x04\x95rest")
    (folder / ".git").mkdir()
    (folder / ".git" / "index.pkl").touch()

    where = [(one.rule, one.where) for one in validate(folder)]

    assert where == [
        ("LH023", f"{folder}/notes.txt"),
        ("LH023", f"{folder}/checkpoint-500/optimizer.pt"),
    ]


def test_links_out_of_the_folder_are_not_followed(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.pkl").touch()
    (folder / "link").symlink_to(tmp_path / "elsewhere")

    assert validate(folder) == ()


# ── texts ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("text", ["a\x1b[2Jb", "a\u202eb", "\u2066a", "a\x00", "a\x9b"])
def test_text_that_steers_what_is_shown_is_an_error_in_a_config(text, folder):
    edit(folder, base_model_name_or_path=f"a/{text}")

    (one,) = validate(folder)

    assert (one.rule, one.severity) == ("LH014", "error")
    assert one.where.endswith("adapter_config.json#/base_model_name_or_path")
    assert one.message.startswith("the text holds U+")


def test_text_that_steers_what_is_shown_is_an_error_in_card_and_header(folder):
    (folder / "README.md").write_text("# \u202etxet")
    save(folder, load(folder), {"format": "pt", "title": "\x1b[31m"})

    assert found(folder) == [("LH014", "error"), ("LH014", "error")]


def test_text_that_steers_what_is_shown_is_an_error_in_a_package(tmp_path):
    package = packages.package(tmp_path / "p", summary="fine \u202e not", key=None)

    assert ("LH014", "error") in found(tmp_path / "p")
    assert package.manifest.summary == "fine \u202e not"


def test_letters_of_all_scripts_and_emoji_are_texts(folder):
    (folder / "README.md").write_text("# стихи 诗 שירה 👩‍💻\n\ttab\r\n")

    assert validate(folder) == ()


# ── metadata of the header ───────────────────────────────────────────────────────────

LIES = {
    "the hash of nothing": {"sshs_model_hash": hashlib.sha256().hexdigest()},
    "the short hash of nothing": {"sshs_legacy_hash": "e3b0c442"},
    "a path": {"ss_output": '{"dir": "/home/someone/out"}'},
    "a path on Windows": {"ss_output": "C:\\Users\\someone"},
}


@pytest.mark.parametrize("case", LIES)
def test_metadata_that_cannot_be_believed_is_a_warning(case, folder):
    save(folder, load(folder), {"format": "pt", **LIES[case]})

    (one,) = validate(folder)

    assert (one.rule, one.severity) == ("LH028", "warning")
    assert f"{WEIGHTS}: __metadata__.{next(iter(LIES[case]))}" in one.where


@pytest.mark.parametrize(
    ("said", "name", "held"),
    [
        ("sd_1.5", "lora_te2_x.lora_down.weight", "SDXL"),
        ("stable-diffusion-v1/lora", "transformer.single_transformer_blocks.0.x", "FLUX"),
        ("sdxl_base_v1-0", "lora_unet_double_blocks_0_x.lora_up.weight", "FLUX"),
    ],
)
def test_family_of_image_models_that_the_tensors_contradict_is_a_warning(
    said, name, held, folder
):
    save(folder, {name: np.zeros((2, 2), "f4")}, {"ss_base_model_version": said})

    messages = [one.message for one in validate(folder) if one.rule == "LH028"]

    assert messages == [f"it says {said!r}, the tensors are those of {held}"]


def test_metadata_of_honest_tools_is_fine(folder):
    save(
        folder,
        load(folder),
        {"format": "pt", "sshs_model_hash": "ab" * 32, "modelspec.architecture": "flux-1"},
    )

    assert validate(folder) == ()


# ── numbers ──────────────────────────────────────────────────────────────────────────


def test_factors_b_that_are_partly_zero_are_a_note(folder):
    arrays = load(folder)
    for layer in (2, 3, 5, 7):
        arrays[factor(layer, "B")][:] = 0
    save(folder, arrays)

    (one,) = validate(folder)

    assert (one.rule, one.severity) == ("LH032", "note")
    assert one.message == (
        "4 of 10 factors b are zero throughout: model.layers.2.q_proj, "
        "model.layers.3.q_proj, model.layers.5.q_proj and 1 more"
    )


@pytest.mark.parametrize("alpha", [0, -8, 0.1, 1024])
def test_scaling_out_of_the_usual_range_is_a_warning(alpha, folder):
    edit(folder, lora_alpha=alpha)

    (one,) = validate(folder)

    assert (one.rule, one.severity) == ("LH033", "warning")
    assert f"the scaling is {alpha / 4:.4g} for model.layers.0.q_proj" in one.message
    assert one.message.endswith("and 7 more")


@pytest.mark.parametrize("alpha", [0.125, 4, 128])
def test_scaling_at_the_ends_of_the_range_is_fine(alpha, folder):
    edit(folder, lora_alpha=alpha)

    assert validate(folder) == ()


def test_target_that_moves_far_more_than_its_kind_is_a_warning(folder):
    arrays = load(folder)
    arrays[factor(6, "B")] *= 50
    save(folder, arrays)

    (one,) = validate(folder)

    assert (one.rule, one.severity) == ("LH034", "warning")
    assert one.where.endswith(f"{WEIGHTS}: model.layers.6.q_proj")


def test_targets_that_move_less_or_a_little_more_are_fine(folder):
    arrays = load(folder)
    arrays[factor(1, "B")] /= 1000
    arrays[factor(6, "B")] *= 3
    save(folder, arrays)

    assert validate(folder) == ()


def test_rank_that_is_not_used_is_a_note(folder):
    arrays = load(folder)
    arrays[factor(3, "A")][2:] = 0
    arrays[factor(4, "B")][:, 1] = arrays[factor(4, "B")][:, 0]
    save(folder, arrays)

    (one,) = validate(folder)

    assert (one.rule, one.severity) == ("LH035", "note")
    assert one.message == (
        "2 of 10 targets use less than their rank; least model.layers.3.q_proj: 2 of 4"
    )


# ── licences ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("Apache-2.0 OR MIT", []),
        ("GPL-2.0-or-later WITH Classpath-exception-2.0", []),
        ("LicenseRef-Own", []),
        ("Apache-2.1", [("LH008", "warning")]),
        ("MIT AND openrail", [("LH008", "warning")]),
    ],
)
def test_licence_that_spdx_does_not_list_is_a_warning(expression, expected, tmp_path):
    packages.package(tmp_path / "p", key=None)
    path = tmp_path / "p" / "lorahub.json"
    path.write_bytes(
        canonical.encode(json.loads(path.read_text()) | {"license": expression})
    )

    assert found(tmp_path / "p") == [*expected, ("LH040", "warning")]


def test_local_path_in_the_config_of_a_package_is_a_warning(tmp_path):
    packages.package(tmp_path / "p", key=None)
    config, manifest = (
        tmp_path / "p" / name for name in ("adapter_config.json", "lorahub.json")
    )
    edit(tmp_path / "p", base_model_name_or_path="/home/someone/llama")
    value = json.loads(manifest.read_text())
    (entry,) = (file for file in value["files"] if file["path"] == config.name)
    entry["sha256"] = digest.of_bytes(config.read_bytes())
    entry["size"] = config.stat().st_size
    manifest.write_bytes(canonical.encode(value))

    assert found(tmp_path / "p") == [("LH024", "warning"), ("LH040", "warning")]
