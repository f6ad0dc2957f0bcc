import json
import shutil
import struct

import pytest

from lora_hub import canonical
from lora_hub.errors import InputError
from lora_hub.package.package import open_package
from lora_hub.registry.publish import push
from lora_hub.registry.registry import init
from lora_hub.registry.trust import TrustStore
from lora_hub.signing import keys
from lora_hub.validation.rules import RULES
from lora_hub.validation.run import MANY, check_all, validate
from tests.builders import sign_package, tiny_adapter, tiny_package

KEY = keys.generate()
PUBLIC = keys.public_pem(keys.private_key(KEY))


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("LORAHUB_HOME", str(tmp_path / "home"))


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return sign_package(tiny_package(tmp_path_factory.mktemp("validate") / "verse"), KEY)


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "verse")


def rules(path):
    return [(one.rule, one.severity) for one in validate(path)]


def edit(folder, change):
    """Change the manifest; it stays canonical."""
    path = folder / "lorahub.json"
    value = json.loads(path.read_text())
    change(value)
    path.write_bytes(canonical.encode(value))


def test_signed_package_with_a_pinned_key_has_no_findings(folder):
    TrustStore().add("tiny-lab", [PUBLIC])

    assert validate(folder) == ()


def test_key_that_is_not_known_is_a_note(folder):
    assert rules(folder) == [("LH043", "note")]


def test_package_without_a_signature_is_a_warning(folder):
    (folder / "model.sig").unlink()

    assert rules(folder) == [("LH040", "warning")]


def test_signature_by_another_key_is_an_error(folder):
    TrustStore().add("tiny-lab", [keys.public_pem(keys.private_key(keys.generate()))])

    assert rules(folder) == [("LH042", "error")]


def test_signature_that_is_none_is_an_error(folder):
    (folder / "model.sig").write_text("{}")

    assert rules(folder) == [("LH041", "error")]


def test_package_that_was_repacked_below_its_signature_is_an_error_without_any_key(folder):
    edit(folder, lambda value: value.update(summary="another one"))

    assert rules(folder) == [("LH042", "error"), ("LH043", "note")]


def test_all_breaches_of_the_schema_are_listed_with_their_pointers(folder):
    def change(value):
        value["name"] = "Verse"
        del value["license"]
        value["adapter"]["modules"][1]["rank"] = 0
        value["base"]["tokenizer"] = {"sha256": "x"}

    edit(folder, change)

    found = validate(folder)

    assert {one.rule for one in found} == {"LH002"}
    pointers = [one.where.partition("lorahub.json")[2] for one in found]
    assert pointers == [
        "",
        "#/adapter/modules/1/rank",
        "#/base/tokenizer/sha256",
        "#/name",
    ]
    assert "'license' is a required property" in found[0].message


def test_manifest_that_is_not_canonical_is_an_error(folder):
    path = folder / "lorahub.json"
    path.write_bytes(path.read_bytes() + b"\n")

    assert rules(folder) == [("LH003", "error")]


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b'{"a":1,"a":1}', b'{"x":NaN}', b"{}"])
def test_manifest_that_cannot_be_read_is_an_error(data, folder):
    (folder / "lorahub.json").write_bytes(data)

    assert rules(folder) == [("LH001", "error")]


def test_unknown_fields_licence_and_task_are_findings_beside_the_others(folder):
    def change(value):
        value["novel"] = 1
        value["license"] = "free"
        value["task"]["id"] = "poetry"

    edit(folder, change)
    (folder / "model.sig").unlink()

    assert rules(folder) == [
        ("LH006", "error"),
        ("LH007", "error"),
        ("LH004", "warning"),
        ("LH040", "warning"),
    ]


def test_newer_manifest_may_have_fields_we_do_not_know(folder):
    edit(folder, lambda value: value.update(novel=1, manifest_version="1.9"))
    (folder / "model.sig").unlink()

    assert rules(folder) == [("LH040", "warning")]


def test_manifest_that_contradicts_itself_is_an_error(folder):
    edit(folder, lambda value: value["files"].pop())

    assert rules(folder) == [("LH005", "error")]


def test_changed_missing_and_added_files_are_all_named(folder):
    (folder / "README.md").write_text("x")
    (folder / "adapter_config.json").unlink()
    (folder / "extra.py").touch()
    (folder / "model.sig").unlink()

    found = validate(folder)

    assert [(one.rule, one.where.rpartition("/")[2]) for one in found] == [
        ("LH010", "README.md"),
        ("LH011", "adapter_config.json"),
        ("LH012", "extra.py"),
        ("LH040", "verse"),
    ]


def test_link_in_a_package_is_an_error(folder):
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to("/etc/passwd")

    assert rules(folder) == [("LH012", "error")]


def test_manifest_that_misstates_the_weights_is_an_error(folder):
    edit(folder, lambda value: value["adapter"]["modules"][0].update(alpha=400))
    (folder / "model.sig").unlink()

    assert rules(folder) == [("LH022", "error"), ("LH040", "warning")]


# ── bare folders ─────────────────────────────────────────────────────────────────────


def test_sound_adapter_folder_has_no_findings(tmp_path):
    assert validate(tiny_adapter(tmp_path / "adapter")) == ()


def test_numbers_that_are_not_finite_are_counted(tmp_path):
    folder = tiny_adapter(tmp_path / "adapter")
    path = folder / "adapter_model.safetensors"
    path.write_bytes(
        path.read_bytes()[:-8] + struct.pack("<ff", float("inf"), float("nan"))
    )

    (found,) = validate(folder)

    assert (found.rule, found.severity) == ("LH030", "error")
    assert found.message == "2 of 16 numbers are NaN or infinite"
    assert "model.layers.1.self_attn.v_proj.lora_B.weight" in found.where


def test_adapter_that_does_nothing_is_a_warning(tmp_path):
    from peft import LoraConfig, get_peft_model

    from tests.builders import tiny_model

    untrained = get_peft_model(
        tiny_model(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    )
    untrained.peft_config["default"].base_model_name_or_path = "a/b"
    untrained.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)

    assert rules(tmp_path / "adapter") == [("LH031", "warning")]


def test_pickles_and_a_base_that_nobody_knows_are_warnings(tmp_path):
    folder = tiny_adapter(tmp_path / "adapter", base_name="/home/someone/llama")
    (folder / "training_args.bin").touch()

    assert rules(folder) == [("LH023", "warning"), ("LH024", "warning")]


def test_folder_that_is_no_adapter_is_an_error(tmp_path):
    assert rules(tmp_path) == [("LH021", "error")]


def test_broken_header_is_an_error(tmp_path):
    folder = tiny_adapter(tmp_path / "adapter")
    (folder / "adapter_model.safetensors").write_bytes(b"ab")

    assert rules(folder) == [("LH020", "error")]


def test_path_that_does_not_exist_is_bad_input(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        validate(tmp_path / "nothing")


# ── registries ───────────────────────────────────────────────────────────────────────


@pytest.fixture
def registry(folder, tmp_path):
    registry = init(tmp_path / "registry", "team")
    push(open_package(folder), registry, public_key=PUBLIC)
    return tmp_path / "registry"


def test_sound_registry_has_no_findings(registry):
    assert validate(registry) == ()


def test_changed_blob_in_a_registry_is_an_error(registry, folder):
    weights = (folder / "adapter_model.safetensors").read_bytes()
    (path,) = (
        path
        for path in registry.glob("blobs/*/*/*")
        if path.is_file() and path.read_bytes() == weights
    )
    path.chmod(0o644)
    path.write_bytes(weights[:-1] + b"\xff")

    assert ("LH050", "error") in rules(registry)


# ── many at once ─────────────────────────────────────────────────────────────────────


def test_folder_of_packages_and_adapters_means_each_of_them_in_order(folder, tmp_path):
    team = tmp_path / "team"
    shutil.copytree(folder, team / "b" / "verse")
    tiny_adapter(team / "a", base_name=None)
    (team / ".git").mkdir()

    checked = check_all([team])

    assert [each.subject for each in checked] == [str(team / "a"), str(team / "b/verse")]
    assert [[one.rule for one in each.findings] for each in checked] == [
        ["LH024"],
        ["LH043"],
    ]


def test_file_means_its_folder_and_no_folder_is_checked_twice(folder):
    checked = check_all([folder / "lorahub.json", folder / "README.md", folder])

    assert [each.subject for each in checked] == [str(folder)]


def test_registry_below_a_folder_is_checked_as_a_registry(registry, tmp_path):
    assert str(tmp_path / "registry") in [each.subject for each in check_all([tmp_path])]


def test_many_processes_find_what_one_finds_in_the_same_order(folder, tmp_path):
    for number in range(MANY):
        shutil.copytree(folder, tmp_path / "many" / f"{number:03d}")
    (tmp_path / "many" / "041" / "extra.py").touch()

    one = check_all([tmp_path / "many"])
    two = check_all([tmp_path / "many"], processes=2)

    assert two == one
    assert [each.subject[-3:] for each in two if len(each.findings) > 1] == ["041"]


def test_packages_checked_together_give_what_each_gives_alone(folder, tmp_path):
    many = tmp_path / "many"
    for number in range(20):
        shutil.copytree(folder, many / f"{number:03d}")
    (many / "003" / "extra.py").touch()
    (many / "005" / "lorahub.json").write_bytes(b"{")
    (many / "007" / "model.sig").unlink()
    (many / "011" / "adapter_model.safetensors").write_bytes(b"changed")
    edit(many / "013", lambda value: value.update(license="Apache 2"))
    tiny_adapter(many / "017", base_name=None)

    checked = check_all([many])

    alone = [validate(many / f"{number:03d}") for number in range(20)]
    assert [each.findings for each in checked] == alone
    assert len({tuple(one.rule for one in findings) for findings in alone}) == 7


def test_every_rule_says_why_and_how_to_mend():
    for rule, row in RULES.items():
        assert rule.startswith("LH")
        assert all((row.title, row.why, row.mend))
