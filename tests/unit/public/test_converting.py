"""`convert`: any dialect in, any dialect out, a whole folder or none."""

import json

import pytest

from lora_hub.cli.commands import convert as command
from lora_hub.cli.main import run
from lora_hub.errors import FormatError, InputError, LossyConversion, StoreError
from lora_hub.formats.detect import DIALECTS, open_adapter
from lora_hub.formats.dialect import ReadOptions
from lora_hub.formats.engines.table import ENGINES
from lora_hub.public.converting import convert
from tests import adapters, packages
from tests.adapters import K0, Q0, TO_Q, part, source
from tests.builders import tiny_adapter, tiny_base


@pytest.fixture
def mlx(tmp_path):
    """Return a folder as MLX-LM writes it."""
    folder = tmp_path / "mlx"
    folder.mkdir()
    adapter = source(part(Q0), part(K0), base_name="tiny-lab/tiny")
    for name, data in adapters.written("mlx", adapter).items():
        (folder / name).write_bytes(data)
    return folder


def test_numbers_survive_the_way_there_and_back(mlx, tmp_path):
    there = convert(mlx, "peft", tmp_path / "peft")
    convert(tmp_path / "peft", "mlx", tmp_path / "back")

    assert there.dialect == "mlx"
    assert there.targets == 2
    assert set(there.files) == {"adapter_config.json", "adapter_model.safetensors"}
    assert adapters.content(open_adapter(tmp_path / "back")) == (
        adapters.content(open_adapter(mlx))
    )


def test_peft_loads_what_was_converted_from_mlx(tmp_path):
    import torch
    from peft import PeftModel

    from tests.builders import logits, tiny_model

    direct = tiny_adapter(tmp_path / "direct")
    convert(direct, "mlx", tmp_path / "mlx")
    convert(tmp_path / "mlx", "peft", tmp_path / "back")

    one, two = (
        logits(PeftModel.from_pretrained(tiny_model(), folder).eval())
        for folder in (direct, tmp_path / "back")
    )

    assert torch.equal(one, two)


def test_one_file_may_be_the_source(mlx, tmp_path):
    done = convert(str(mlx / "adapters.safetensors"), "loralib", tmp_path / "out")

    assert done.notes == ("the file cannot hold its alpha: read it with lora_alpha=4.0",)
    found = open_adapter(tmp_path / "out", ReadOptions(alpha=4.0))
    assert {update.scaling for update in found.updates} == {2.0}


def test_package_may_be_the_source(tmp_path):
    packages.package(tmp_path / "package")

    done = convert(tmp_path / "package", "mlx", tmp_path / "out")

    assert done.evidence == ("it is the package style/tiny 1.0.0",)


def test_local_path_of_the_base_is_left_out_and_told(tmp_path):
    folder = tiny_adapter(tmp_path / "adapter", base_name="/home/someone/base")

    done = convert(folder, "peft", tmp_path / "out")

    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert "base_model_name_or_path" not in config
    assert done.notes == ("the base was named by a local path, which is left out",)


def test_what_would_be_lost_is_listed_and_nothing_is_written(tmp_path):
    folder = tiny_adapter(
        tmp_path / "adapter", rank_pattern={"v_proj": 3}, alpha_pattern={"v_proj": 9}
    )

    with pytest.raises(LossyConversion) as error:
        convert(folder, "mlx", tmp_path / "out")

    assert len(error.value.losses) == 2
    assert error.value.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_folder_that_is_taken_stays_as_it_was(mlx, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("keep me")

    with pytest.raises(StoreError, match="not empty"):
        convert(mlx, "peft", tmp_path / "out")

    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_dialect_that_is_none_is_refused(mlx, tmp_path):
    with pytest.raises(InputError, match="'onnx' is no dialect"):
        convert(mlx, "onnx", tmp_path / "out")


def test_dialect_that_the_files_are_not_is_refused(mlx, tmp_path):
    with pytest.raises(FormatError, match="nothing here is of kohya's sd-scripts"):
        convert(mlx, "peft", tmp_path / "out", dialect="kohya")


def test_dialect_decides_where_a_config_of_another_lies_beside(mlx, tmp_path):
    base = adapters.pipeline_base(tmp_path / "base")
    files = adapters.written("kohya", source(part(TO_Q)))
    (mlx / "lora.safetensors").write_bytes(files["lora.safetensors"])

    done = convert(mlx, "diffusers", tmp_path / "out", dialect="kohya", base=base)

    assert done.dialect == "kohya"


def test_command_offers_the_dialects_of_the_table():
    offered = {one.name: getattr(one.type, "choices", ()) for one in command.command.params}

    assert list(offered["to"]) == list(offered["dialect"]) == list(DIALECTS)


def test_command_offers_the_engines_of_the_table():
    assert list(ENGINES) == command.ENGINES


def test_command_writes_for_an_engine_and_tells_the_error(tmp_path, capsys):
    folder = tiny_adapter(tmp_path / "adapter", alpha_pattern={"v_proj": 9})
    out = str(tmp_path / "out")

    code = run(["convert", str(folder), "--to", "peft", "--for", "vllm", "--out", out])

    said = capsys.readouterr()
    assert code == 0
    assert "as peft for vllm: 4 targets" in said.out
    assert "were rounded once" in said.out + said.err


def test_command_says_in_json_how_exact_it_is(tmp_path, capsys):
    folder = tiny_adapter(tmp_path / "adapter", use_rslora=True)
    arguments = ["--to", "peft", "--for", "sglang", "--out", str(tmp_path / "out")]

    assert run(["convert", str(folder), *arguments, "--json"]) == 0

    value = json.loads(capsys.readouterr().out)
    assert (value["engine"], value["error"]) == ("sglang", 0.0)


def test_command_says_what_it_read_and_wrote(mlx, tmp_path, capsys):
    code = run(["convert", str(mlx), "--to", "peft", "--out", str(tmp_path / "out")])

    said = capsys.readouterr().out
    assert code == 0
    assert "as mlx: adapter_config.json names fine_tune_type" in said
    assert "as peft: 2 targets" in said


def test_command_prints_json(mlx, tmp_path, capsys):
    out = str(tmp_path / "out")

    assert run(["convert", str(mlx), "--to", "loralib", "--out", out, "--json"]) == 0

    value = json.loads(capsys.readouterr().out)
    assert (value["dialect"], value["to"], value["targets"]) == ("mlx", "loralib", 2)


def test_command_takes_what_no_file_says(tmp_path, capsys):
    base = adapters.pipeline_base(tmp_path / "base")
    folder = tmp_path / "kohya"
    folder.mkdir()
    files = adapters.written("kohya", source(part(TO_Q)))
    (folder / "mine.safetensors").write_bytes(files["lora.safetensors"])
    arguments = [
        "convert",
        str(folder),
        "--to",
        "diffusers",
        "--out",
        str(tmp_path / "out"),
    ]

    assert run(arguments) == 2
    assert "--base" in capsys.readouterr().err
    assert run([*arguments, "--base", str(base)]) == 0
    assert open_adapter(tmp_path / "out").updates[0].target == TO_Q


def test_inspect_and_validate_take_a_folder_in_another_dialect(mlx, capsys):
    assert run(["inspect", str(mlx), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["modules"]) == 2
    assert run(["validate", str(mlx)]) == 0


def test_pack_makes_a_package_of_a_folder_in_another_dialect(tmp_path):
    from lora_hub.package.package import load_source
    from lora_hub.public.packaging import pack

    base = tiny_base(tmp_path / "base")
    convert(tiny_adapter(tmp_path / "peft"), "gguf", tmp_path / "gguf", base=base)

    package = pack(
        tmp_path / "gguf",
        out=tmp_path / "package",
        name="me/ad",
        version="1.0.0",
        base=base,
        task="text-generation",
        license="MIT",
    )

    assert adapters.content(load_source(package)) == (
        adapters.content(open_adapter(tmp_path / "peft"))
    )
