"""Every rule is broken by something, and not by what looks much like it.

The table says for each rule what is checked, how it is broken, and the nearest thing that
breaks it not.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from lora_hub import canonical
from lora_hub.package.package import open_package
from lora_hub.public.packaging import check
from lora_hub.registry.publish import push
from lora_hub.registry.registry import init
from lora_hub.registry.trust import TrustStore
from lora_hub.signing import keys
from lora_hub.validation.rules import RULES
from tests import packages

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model.model.layers"
OTHER = keys.public_pem(keys.private_key(keys.generate()))
OURS = keys.public_pem(packages.KEY)

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
OF_NOTHING = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


# ── what is checked ──────────────────────────────────────────────────────────────────


def adapter(folder):
    """Make an adapter with ten targets of one kind, all alike."""
    folder.mkdir()
    (folder / CONFIG).write_text(
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
    shapes = {"A": (4, 16), "B": (16, 4)}
    save_file(
        {
            factor(layer, side): numbers.normal(size=shape).astype("f4")
            for layer in range(10)
            for side, shape in shapes.items()
        },
        folder / WEIGHTS,
    )


def package(folder):
    packages.package(folder)


def registry(folder):
    packages.package(folder.parent / "source")
    made = init(folder, "team")
    push(open_package(folder.parent / "source"), made, public_key=OURS)


def factor(layer, side):
    return f"{PREFIX}.{layer}.q_proj.lora_{side}.weight"


# ── how it is changed ────────────────────────────────────────────────────────────────


def nothing(folder):
    """Leave it as it is."""


def write(name, content=b""):
    def change(folder):
        data = content.encode() if isinstance(content, str) else content
        (folder / name).write_bytes(data)

    return change


def remove(name):
    return lambda folder: (folder / name).unlink()


def renamed(name, new):
    return lambda folder: (folder / name).rename(folder / new)


def link(name, to):
    def change(folder):
        (folder.parent / "elsewhere").write_text("a text")
        (folder / "here").write_text("a text")
        (folder / name).symlink_to(to)

    return change


def config(**changes):
    def change(folder):
        path = folder / CONFIG
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def manifest(edit):
    def change(folder):
        path = folder / "lorahub.json"
        value = json.loads(path.read_text())
        edit(value)
        path.write_bytes(canonical.encode(value))

    return change


def fields(**changes):
    return manifest(lambda value: value.update(changes))


def task(name):
    return manifest(lambda value: value["task"].update(id=name))


def arrays(edit, metadata=None):
    """Return the change of the numbers by `edit`, which may add tensors."""

    def change(folder):
        from safetensors.numpy import load_file

        held = load_file(folder / WEIGHTS)
        edit(held)
        save_file(held, folder / WEIGHTS, metadata)

    return change


def scaled(by, layers=(0,), side="B"):
    def edit(held):
        for layer in layers:
            held[factor(layer, side)] *= np.float32(by)

    return arrays(edit)


def number(value):
    def edit(held):
        held[factor(3, "A")][1, 2] = value

    return arrays(edit)


def alike_rows(held):
    held[factor(3, "A")][:] = 1


def added(name, values, **changes):
    """Return the change that adds a tensor, and says so in the config."""

    def change(folder):
        arrays(lambda held: held.update({f"base_model.model.{name}": values}))(folder)
        config(**changes)(folder)

    return change


def pinned(key):
    return lambda folder: TrustStore().add("style", [key])


def damaged(folder):
    path = next(path for path in folder.glob("blobs/*/*/*") if path.is_file())
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")


def waiver(rule="LH040", until="9999-12-31", place="."):
    """Return the change that lays a file of waivers where the check runs, or in the way."""

    def change(folder):
        text = f'[[waiver]]\nrule = "{rule}"\nwhere = "*"\nreason = "so"\nuntil = {until}\n'
        (folder.parent / place / "lorahub-waivers.toml").write_text(text)
        if rule == "LH040":
            (folder / "model.sig").unlink()

    return change


HEAD = np.ones((2, 16), "f4")
HEADED = {"modules_to_save": ["score"]}

# rule → what, how it is broken, what looks much like it
TABLE = {
    "LH001": (package, write("lorahub.json", "{"), nothing),
    "LH002": (package, manifest(lambda value: value.pop("license")), fields(summary="x")),
    "LH003": (
        package,
        lambda folder: write(
            "lorahub.json", (folder / "lorahub.json").read_bytes() + b"\n"
        )(folder),
        fields(summary="é"),
    ),
    "LH004": (package, fields(novel=1), fields(ext={"novel": 1})),
    "LH005": (package, manifest(lambda value: value["files"].pop()), fields(summary="x")),
    "LH006": (package, fields(license="free"), fields(license="MIT OR Apache-2.0")),
    "LH007": (package, task("poetry"), task("text-generation/poetry")),
    "LH008": (package, fields(license="MIT-2"), fields(license="LicenseRef-mine")),
    "LH010": (package, write("README.md", "x"), nothing),
    "LH011": (package, remove("README.md"), nothing),
    "LH012": (package, write("extra.py"), write(".gitignore", "*")),
    "LH013": (adapter, write("README.md", POINTER), write("README.md", f"A {POINTER}")),
    "LH014": (
        adapter,
        write("README.md", "\x1b[2J"),
        write("README.md", "é\t☃ \U0001f600 العربية\r\n"),
    ),
    "LH020": (adapter, write(WEIGHTS, "ab"), nothing),
    "LH021": (adapter, config(r=3), config(lora_dropout=0.3, peft_version="0.21.2")),
    "LH022": (
        package,
        manifest(lambda value: value["adapter"]["modules"][0].update(alpha=400)),
        fields(summary="x"),
    ),
    "LH023": (
        adapter,
        write("training_args.bin"),
        write("other.safetensors", b"\x80\x02" + bytes(6)),  # a header of 640 bytes
    ),
    "LH024": (
        adapter,
        config(base_model_name_or_path="/home/me/llama"),
        config(base_model_name_or_path="home/llama"),
    ),
    "LH025": (
        adapter,
        config(base_model_name_or_path="tiny-lab/tiny-bnb-4bit"),
        config(base_model_name_or_path="tiny-lab/tiny-4b"),
    ),
    "LH026": (
        adapter,
        config(base_model_name_or_path="gpt2"),
        config(base_model_name_or_path="openai-community/gpt2"),
    ),
    "LH027": (adapter, config(revision="main"), config(revision="0123456789" * 4)),
    "LH028": (
        adapter,
        arrays(lambda held: None, {"sshs_model_hash": OF_NOTHING}),
        arrays(
            lambda held: None, {"sshs_model_hash": OF_NOTHING[::-1], "note": "e3b0c442"}
        ),
    ),
    "LH030": (adapter, number(np.nan), number(np.finfo("f4").max)),
    "LH031": (adapter, scaled(0, range(10)), scaled(0, range(9))),
    "LH032": (adapter, scaled(0), scaled(1e-3)),
    "LH033": (adapter, config(lora_alpha=129), config(lora_alpha=128)),
    "LH034": (adapter, scaled(1000), scaled(2)),
    "LH035": (adapter, arrays(alike_rows), scaled(0.01, side="A")),
    "LH040": (package, remove("model.sig"), nothing),
    "LH041": (package, write("model.sig", "{}"), nothing),
    "LH042": (package, pinned(OTHER), pinned(OURS)),
    "LH043": (package, nothing, pinned(OURS)),
    "LH050": (registry, damaged, nothing),
    "LH060": (package, waiver(until="2020-01-01"), waiver()),
    "LH061": (package, waiver(rule="LH041"), waiver()),
    "LH063": (
        adapter,
        added("score.weight", 0 * HEAD, **HEADED),
        added("score.bias", 0 * HEAD[0], **HEADED),
    ),
    "LH064": (adapter, config(**HEADED), added("score.weight", HEAD, **HEADED)),
    "LH065": (package, waiver(place="checked"), waiver()),
    "LH066": (
        adapter,
        added("model.embed_tokens.weight", HEAD),
        added("model.embed_tokens.weight", HEAD, modules_to_save=["embed_tokens"]),
    ),
    "LH067": (adapter, renamed(WEIGHTS, "model.safetensors"), nothing),
    "LH080": (adapter, link("README.md", "../elsewhere"), link("README.md", "here")),
    "LH081": (
        adapter,
        write("tokenizer_config.json", '{"auto_map": {"AutoTokenizer": ["evil.T", null]}}'),
        write("tokenizer_config.json", '{"auto_map": {}, "chat_template": "auto_map"}'),
    ),
}


# What every reader refuses today; test_kinds_rules.py gives it to the check itself.
NOT_READ = {"LH062"}


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """Stand where the user does: the thing to check lies in a folder there."""
    monkeypatch.setenv("LORAHUB_HOME", str(tmp_path / "home"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def found(make, change):
    make(Path("checked").absolute())
    change(Path("checked").absolute())
    return {one.rule for each in check("checked") for one in each.findings}


def test_table_has_every_rule():
    assert list(TABLE) == [rule for rule in RULES if rule not in NOT_READ]


@pytest.mark.parametrize("rule", TABLE)
def test_rule_is_broken_by_what_breaks_it(rule):
    make, broken, _ = TABLE[rule]

    assert rule in found(make, broken)


@pytest.mark.parametrize("rule", TABLE)
def test_rule_is_not_broken_by_what_looks_much_like_it(rule):
    make, _, near = TABLE[rule]

    assert rule not in found(make, near)
