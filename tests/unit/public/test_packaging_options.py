"""What an adapter's files leave open is said on the command line, and in Python."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_hub
from lora_hub.cli import options
from lora_hub.cli.main import run
from lora_hub.errors import FormatError, InputError
from lora_hub.formats.detect import DIALECTS
from lora_hub.public.converting import convert
from tests import adapters
from tests.adapters import PIPELINE
from tests.builders import tiny_adapter, tiny_base, tiny_package

PACK = {
    "name": "tiny-lab/verse",
    "version": "1.0.0",
    "task": "text-generation",
    "license": "MIT",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_base(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture
def loralib(tmp_path):
    """Return a folder with an adapter as loralib saves it: no alpha anywhere."""
    peft = tiny_adapter(tmp_path / "peft", rank=2, alpha=6)
    folder = tmp_path / "loralib"
    folder.mkdir()
    tensors = load_file(peft / "adapter_model.safetensors")
    save_file(
        {
            name.removeprefix("base_model.model.").removesuffix(".weight"): tensor
            for name, tensor in tensors.items()
        },
        folder / "lora.safetensors",
    )
    return folder


@pytest.fixture
def unsure(tmp_path):
    """Return a folder whose MLX config holds both numbers."""
    peft = tiny_adapter(tmp_path / "peft", rank=2, alpha=6)
    convert(peft, "mlx", tmp_path / "mlx")
    path = tmp_path / "mlx" / "adapter_config.json"
    config = json.loads(path.read_text())
    config["lora_parameters"]["alpha"] = 8.0
    path.write_text(json.dumps(config))
    return tmp_path / "mlx"


def test_the_alpha_of_a_loralib_file_is_given(loralib, base, tmp_path):
    with pytest.raises((InputError, FormatError), match="alpha"):
        lora_hub.pack(loralib, base=base, out=tmp_path / "none", **PACK)

    package = lora_hub.pack(loralib, base=base, out=tmp_path / "out", alpha=6.0, **PACK)

    assert {module.alpha for module in package.manifest.adapter.modules} == {6.0}


def test_the_command_line_says_it_too(loralib, base, tmp_path, capsys):
    fields = [f"--{key}={value}" for key, value in PACK.items()]
    said = ["--base", str(base), "--from", "loralib", "--alpha", "6"]

    assert run(["pack", str(loralib), *fields, *said, "--out", str(tmp_path / "o")]) == 0
    capsys.readouterr()
    assert run(["inspect", str(loralib), "--alpha", "6", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert {module["scaling"] for module in summary["modules"]} == {3.0}
    assert run(["inspect", str(loralib)]) == 2


def test_validate_reads_as_it_is_told(loralib, capsys):
    without = lora_hub.validate(loralib)
    told = lora_hub.validate(loralib, alpha=6.0)

    assert "LH021" in {one.rule for one in without}
    assert "LH021" not in {one.rule for one in told}
    assert run(["validate", str(loralib), "--alpha", "6", "--from", "loralib"]) == 0


def test_which_number_of_mlx_holds_is_given(unsure, base, tmp_path):
    found = {
        which: lora_hub.pack(
            unsure, base=base, out=tmp_path / which, scale_from=which, **PACK
        )
        for which in ("alpha", "scale")
    }

    scalings = {
        which: package.manifest.adapter.modules[0].alpha
        / package.manifest.adapter.modules[0].rank
        for which, package in found.items()
    }
    # MLX-LM's first versions multiplied by scale * alpha / rank.
    assert scalings == {"alpha": 12.0, "scale": 3.0}


def test_a_dialect_that_there_is_not_is_refused(loralib, base, tmp_path):
    with pytest.raises(InputError, match="'pfet' is no dialect"):
        lora_hub.pack(loralib, base=base, out=tmp_path / "out", from_="pfet", **PACK)
    with pytest.raises(InputError, match="'pfet' is no dialect"):
        lora_hub.validate(loralib, from_="pfet")


def test_the_initial_factors_of_pissa_are_given(base, tmp_path):
    folder, initial = (
        tiny_adapter(tmp_path / name, init_lora_weights="pissa", seed=seed)
        for name, seed in (("trained", 1), ("initial", 2))
    )

    with pytest.raises(FormatError, match="init_lora_weights"):
        lora_hub.pack(folder, base=base, out=tmp_path / "none", **PACK)
    package = lora_hub.pack(
        folder, base=base, out=tmp_path / "out", initial=initial, **PACK
    )

    assert {module.rank for module in package.manifest.adapter.modules} == {4}


def test_the_base_is_given_to_whoever_only_looks(tmp_path, capsys):
    base = adapters.pipeline_base(tmp_path / "base")
    folder = tmp_path / "kohya"
    folder.mkdir()
    written = adapters.written("kohya", adapters.source(*map(adapters.part, PIPELINE)))
    (folder / "lora.safetensors").write_bytes(written["lora.safetensors"])

    assert run(["inspect", str(folder)]) == 2
    assert "give the folder of the base with --base" in capsys.readouterr().err
    assert run(["inspect", str(folder), "--base", str(base), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert {module["module"] for module in summary["modules"]} == set(PIPELINE)
    assert "LH021" in {one.rule for one in lora_hub.validate(folder)}
    assert "LH021" not in {one.rule for one in lora_hub.validate(folder, base=base)}
    assert run(["validate", str(folder), "--base", str(base)]) == 0


def test_the_parts_of_a_merged_layer_are_given_to_whoever_only_looks(tmp_path, capsys):
    folder = tmp_path / "loralib"
    folder.mkdir()
    tensors = {
        "c_attn.lora_A": np.ones((4, 8), "f4"),
        "c_attn.lora_B": np.ones((16, 2), "f4"),
    }
    save_file(tensors, folder / "lora.safetensors")
    said = [str(folder), "--alpha", "4", "--enable-lora"]

    assert run(["inspect", *said, "1,0,1", "--json"]) == 0
    (module,) = json.loads(capsys.readouterr().out)["modules"]
    assert module["shape"] == [24, 8]
    assert run(["inspect", *said, "yes"]) == 2
    assert "give 0 or 1 for each part" in capsys.readouterr().err


def test_the_command_line_offers_every_dialect():
    assert list(DIALECTS) == options.DIALECTS


def test_of_a_package_nothing_is_left_to_say(tmp_path, capsys):
    package = tiny_package(tmp_path / "verse")

    assert run(["inspect", str(package), "--alpha", "6"]) == 2
    assert "its files leave nothing open" in capsys.readouterr().err
    assert run(["inspect", str(package)]) == 0
