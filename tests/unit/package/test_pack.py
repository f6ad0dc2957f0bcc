import json

import pytest

from lora_hub import digest
from lora_hub.base.folder import FolderBase, describe
from lora_hub.errors import (
    DocumentError,
    FitError,
    FormatError,
    InputError,
    ReferenceSyntaxError,
    StoreError,
)
from lora_hub.manifest.document import BaseHint
from lora_hub.package.pack import plan_package, write_package
from lora_hub.package.package import check_complete, load_source
from tests.builders import BASE_NAME, logits, tiny_adapter, tiny_base, tiny_model

FIELDS = {
    "name": "tiny-lab/verse",
    "version": "1.0.0",
    "task": "text-generation/verse",
    "license": "Apache-2.0",
    "created": "2026-01-01T00:00:00Z",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_base(tmp_path_factory.mktemp("pack") / "base")


@pytest.fixture
def adapter(tmp_path):
    return tiny_adapter(tmp_path / "adapter", rank=2, rank_pattern={"v_proj": 3})


def plan(adapter, base, **fields):
    return plan_package(adapter, base=base, **FIELDS | fields)


def test_package_holds_these_files_and_no_others(adapter, base, tmp_path):
    package = write_package(plan(adapter, base), tmp_path / "out")

    check_complete(package)
    assert package.names == (
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "lorahub.json",
    )


def test_package_digest_is_that_of_the_manifest_file(adapter, base, tmp_path):
    planned = plan(adapter, base)

    package = write_package(planned, tmp_path / "out")

    assert package.digest == planned.digest
    data = (tmp_path / "out" / "lorahub.json").read_bytes()
    assert digest.of_bytes(data) == planned.digest


def test_manifest_expands_every_module(adapter, base):
    modules = plan(adapter, base).manifest.adapter.modules

    assert [(m.module, m.rank, m.alpha, m.a, m.b) for m in modules[:2]] == [
        ("model.layers.0.self_attn.q_proj", 2, 4.0, (2, 16), (16, 2)),
        ("model.layers.0.self_attn.v_proj", 3, 4.0, (3, 16), (8, 3)),
    ]
    assert {module.scaling for module in modules} == {"alpha/r"}


def test_manifest_sums_up_the_adapter(adapter, base):
    summary = plan(adapter, base).manifest.adapter.summary

    assert summary.max_rank == 3
    assert summary.ranks == (2, 3)
    assert summary.parameters == 2 * (2 * 32 + 3 * 24)
    assert summary.target_names == ("q_proj", "v_proj")
    assert summary.layers == 2


def test_manifest_identifies_the_base_by_content(adapter, base):
    manifest = plan(adapter, base, base_license="MIT").manifest
    targets = [module.module for module in manifest.adapter.modules]
    with FolderBase.open(base) as view:
        expected = describe(view, targets)

    assert manifest.base.root == expected.root
    assert manifest.base.targets == expected.targets
    assert manifest.base.license == "MIT"


@pytest.mark.parametrize("use_rslora", [False, True])
def test_peft_loads_the_package_and_gives_the_same_logits_as_the_source(
    use_rslora, base, tmp_path
):
    from peft import PeftModel

    source = tiny_adapter(
        tmp_path / "adapter",
        targets=["q_proj", "down_proj", "lm_head"],
        rank_pattern={"layers.0.self_attn.q_proj": 4, "lm_head": 1},
        alpha_pattern={"down_proj": 0.5},
        use_rslora=use_rslora,
    )
    write_package(plan(source, base), tmp_path / "out")

    expected = logits(PeftModel.from_pretrained(tiny_model(), source))
    found = logits(PeftModel.from_pretrained(tiny_model(), tmp_path / "out"))

    assert not expected.equal(logits(tiny_model()))
    assert found.equal(expected)


def test_peft_loads_an_adapter_of_some_layers_without_missing_keys(base, tmp_path):
    """A short target_modules would make PEFT adapt the other layers too, and warn."""
    from peft import PeftModel

    source = tiny_adapter(tmp_path / "adapter", layers_to_transform=[1])
    write_package(plan(source, base), tmp_path / "out")

    model = PeftModel.from_pretrained(tiny_model(), tmp_path / "out")

    assert logits(model).equal(logits(PeftModel.from_pretrained(tiny_model(), source)))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == [
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.v_proj",
    ]


def test_tensors_are_copied_byte_for_byte_in_order_of_names(adapter, base, tmp_path):
    from safetensors import safe_open

    package = write_package(plan(adapter, base), tmp_path / "out")

    weights = load_source(package).tensors
    names = list(weights.header.tensors)
    assert names == sorted(names)
    with (
        safe_open(adapter / "adapter_model.safetensors", "pt") as theirs,
        safe_open(tmp_path / "out" / "adapter_model.safetensors", "pt") as ours,
    ):
        assert ours.metadata() == {"format": "pt"}
        assert set(ours.keys()) == set(theirs.keys())
        assert all(ours.get_tensor(n).equal(theirs.get_tensor(n)) for n in names)


def test_created_is_the_time_of_source_date_epoch(adapter, base, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")

    assert plan(adapter, base, created=None).manifest.created == "2023-11-14T22:13:20Z"


def test_licences_and_a_changed_tokenizer_come_along_and_nothing_else(adapter, base):
    (adapter / "LICENSE").write_text("do what you like")
    (adapter / "tokenizer.json").write_text("{}")
    (adapter / "chat_template.jinja").write_text("{{ messages }}")
    (adapter / "holdout.json").write_text("{}")
    (adapter / "modeling.py").write_text("import os")

    planned = plan(adapter, base)

    assert {file.path: file.role for file in planned.manifest.files} == {
        "LICENSE": "license",
        "README.md": "card",
        "adapter_config.json": "config",
        "adapter_model.safetensors": "weights",
        "chat_template.jinja": "tokenizer",
        "tokenizer.json": "tokenizer",
    }
    assert planned.manifest.prompt.chat_template_file == "chat_template.jinja"
    assert planned.left_out == ("holdout.json", "modeling.py")


def test_tokenizer_that_is_the_base_s_own_stays_out(adapter, tmp_path):
    base = tiny_base(tmp_path / "base")
    for folder in (adapter, base):
        (folder / "tokenizer_config.json").write_text('{"a": 1}')

    assert "tokenizer_config.json" in plan(adapter, base).left_out


def test_dry_run_names_files_and_what_is_left_out(adapter, base):
    (adapter / "holdout.json").write_text("{}")

    text = str(plan(adapter, base))

    assert "tiny-lab/verse 1.0.0  sha256:" in text
    assert "4 targets (q_proj, v_proj), rank 3" in text
    assert "adapter_model.safetensors" in text
    assert "left out: holdout.json" in text


def test_author_s_words_stay_below_the_front_matter(adapter, base):
    (adapter / "README.md").write_text("---\nlicense: gpl\n---\n# My verse\n")

    card = b"".join(plan(adapter, base).files["README.md"]).decode()

    assert card.startswith(f'---\nbase_model: "{BASE_NAME}"\n')
    assert card.endswith("---\n\n# My verse\n")
    assert "gpl" not in card


@pytest.mark.parametrize(
    "name",
    [
        None,
        "/home/someone/models/llama",
        "../llama",
        "~/llama",
        "llama",
        "a/b/c",
        "C:\\x",
        "a" * 5000 + "/b",
    ],
)
def test_what_is_no_name_on_a_hub_is_never_published(name, base, tmp_path):
    source = tiny_adapter(tmp_path / "adapter", base_name=name)

    planned = plan(source, base)

    assert planned.manifest.base.hints == ()
    for file in ("adapter_config.json", "README.md", "lorahub.json"):
        assert b"base_model_name" not in b"".join(planned.files[file])
        assert (
            name is None
            or len(name) < 6
            or name.encode() not in b"".join(planned.files[file])
        )


def test_folder_that_looks_like_a_name_on_a_hub_is_not_published(
    base, tmp_path, monkeypatch
):
    source = tiny_adapter(tmp_path / "adapter", base_name="models/llama")
    (tmp_path / "models" / "llama").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)

    assert plan(source, base).manifest.base.hints == ()


def test_hint_that_is_given_becomes_the_base_of_the_config(adapter, base):
    commit = "a" * 40
    hint = BaseHint(hub="hf", repo="org/model", revision=commit)

    planned = plan(adapter, base, hints=[hint])

    assert planned.manifest.base.hints == (hint,)
    config = json.loads(b"".join(planned.files["adapter_config.json"]))
    assert config["base_model_name_or_path"] == "org/model"
    assert config["revision"] == commit


def test_further_fields_reach_the_manifest(adapter, base):
    extra = {
        "training": {"method": "SFT", "steps": 80},
        "evaluation": [
            {"suite": "holdout", "metric": "loss", "value": 3.5, "base_value": 4.25}
        ],
    }

    manifest = plan(adapter, base, extra=extra).manifest

    assert manifest.training.steps == 80
    assert manifest.evaluation[0].base_value == 4.25


REFUSED = [
    ({"name": "Verse"}, ReferenceSyntaxError, "a name is namespace/name"),
    ({"version": "1.0"}, ReferenceSyntaxError, "'1.0' is no version"),
    ({"task": "poetry"}, InputError, "'poetry' is no task"),
    ({"task": "text-generation/Verse!"}, DocumentError, "matching regex"),
    ({"license": "other"}, InputError, "no SPDX expression"),
    ({"base_license": "free"}, InputError, "no SPDX expression"),
    ({"license": "MIT OR LicenseRef-Mine"}, InputError, "its text is missing"),
    ({"summary": "x" * 301}, DocumentError, "length <= 300"),
    ({"languages": ["English"]}, DocumentError, "matching regex"),
    ({"created": "today"}, DocumentError, "matching regex"),
    ({"extra": {"kind": "lora"}}, InputError, "'kind' cannot be stated here"),
    ({"extra": {"training": {"mood": 1}}}, InputError, "has no such field"),
    ({"extra": {"training": {"steps": "80"}}}, DocumentError, "expected `int"),
    ({"hints": [BaseHint(hub="hf", repo="/srv/x")]}, InputError, "is a local path"),
]


@pytest.mark.parametrize(("fields", "error_class", "problem"), REFUSED)
def test_field_that_the_manifest_cannot_hold_is_refused(
    fields, error_class, problem, adapter, base
):
    with pytest.raises(error_class) as error:
        plan(adapter, base, **fields)

    assert problem in error.value.problem


@pytest.mark.parametrize("name", ["training_args.bin", "x.PT", "optimizer.pth", "a.pkl"])
def test_pickles_are_refused_by_name(name, adapter, base):
    (adapter / name).write_bytes(b"\x80\x04.")

    with pytest.raises(FormatError, match=f"'{name}'"):
        plan(adapter, base)


def test_lfs_pointer_as_a_licence_is_refused(adapter, base):
    (adapter / "LICENSE").write_text("version https://git-lfs.github.com/spec/v1\n")

    with pytest.raises(InputError, match="Git LFS pointer"):
        plan(adapter, base)


def test_base_that_lacks_a_target_is_refused(adapter, tmp_path):
    other = tiny_base(tmp_path / "base", layers=1)

    with pytest.raises(FitError, match="2 of 4 targets do not fit"):
        plan(adapter, other)


def test_folder_that_is_not_empty_is_left_alone(adapter, base, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()

    with pytest.raises(StoreError, match="not empty"):
        write_package(plan(adapter, base), tmp_path / "out")

    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]


def test_a_tokenizer_that_names_code_to_run_is_refused(adapter, base):
    text = '{"auto_map": {"AutoTokenizer": ["code.Tokenizer", null]}}'
    (adapter / "tokenizer_config.json").write_text(text)

    with pytest.raises(FormatError, match="auto_map"):
        plan(adapter, base)
