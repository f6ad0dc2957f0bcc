"""What people really have in their folders: named in one line, with what to do; no bug."""

import gzip
import io
import json
import os
import zipfile

import pytest

from lora_hub.cli.main import run
from tests.builders import tensor_bytes, tiny_base

Q = "model.layers.0.self_attn.q_proj"
PEFT = f"base_model.model.{Q}"
FACTORS = {"lora_A.weight": (2, 8), "lora_B.weight": (8, 2)}
WEIGHTS = "adapter_model.safetensors"


def config(**more):
    known = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    known |= {"base_model_name_or_path": "org/model", "task_type": "CAUSAL_LM"}
    return json.dumps(known | more).encode()


def factors(prefix=PEFT, middle=""):
    return {
        f"{prefix}.{name.replace('.weight', f'{middle}.weight')}": ("F32", shape)
        for name, shape in FACTORS.items()
    }


def mlx(**more):
    return json.dumps({"model": "org/model", "lora_layers": 4} | more).encode()


def archive():
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as file:
        file.writestr(WEIGHTS, b"")
    return data.getvalue()


GOOD = tensor_bytes(factors())
MLX = tensor_bytes({f"{Q}.lora_a": ("F32", (8, 2)), f"{Q}.lora_b": ("F32", (2, 8))})
PICKLE = b"\x80\x04pickle"

# name → files; what is said, and what to do
REFUSED = {
    "the adapter's name in every tensor": (
        {
            "adapter_config.json": config(),
            WEIGHTS: tensor_bytes(factors(middle=".default")),
        },
        "has the adapter's name 'default' in it, and PEFT would drop it in silence",
        "save_pretrained",
    ),
    "the adapter's name in one tensor": (
        {
            "adapter_config.json": config(),
            WEIGHTS: tensor_bytes(
                factors() | factors(PEFT.replace(".0.", ".1."), ".style")
            ),
        },
        "has the adapter's name 'style' in it",
        "save_pretrained",
    ),
    "a head with its wrapper's name": (
        {
            "adapter_config.json": config(task_type="SEQ_CLS"),
            WEIGHTS: tensor_bytes(
                factors()
                | {"base_model.model.score.modules_to_save.default.weight": ("F32", (2, 8))}
            ),
        },
        "has modules_to_save in its name and is nobody's copy",
        "save_pretrained",
    ),
    "no prefix": (
        {"adapter_config.json": config(), WEIGHTS: tensor_bytes(factors(Q))},
        "is not named as PEFT does",
        "put base_model.model. in front",
    ),
    "shards": (
        {"adapter_config.json": config(), "adapter_model-00001-of-00002.safetensors": GOOD},
        f"there is no {WEIGHTS}; found 'adapter_model-00001-of-00002.safetensors'",
        "the adapter is in parts",
    ),
    "weights of two names": (
        {"adapter_config.json": config(), "A.SAFETENSORS": GOOD, "b.safetensors": GOOD},
        f"there is no {WEIGHTS}; found 'A.SAFETENSORS', 'b.safetensors'",
        f"rename it to {WEIGHTS}",
    ),
    "no weights": (
        {"adapter_config.json": config()},
        f"there is no {WEIGHTS}",
        "ended before it was written",
    ),
    "a zip archive": (
        {"adapter.zip": archive()},
        "'adapter.zip' is an archive, which is never opened",
        "unpack it",
    ),
    "a tar archive": (
        {"adapter.tar.gz": gzip.compress(b"")},
        "'adapter.tar.gz' is an archive",
        "unpack it",
    ),
    "numpy's archive of MLX": (
        {"adapter_config.json": mlx(fine_tune_type="lora"), "adapters.npz": archive()},
        "there is no adapters.safetensors, and 'adapters.npz' is an archive",
        "mx.save_safetensors",
    ),
    "MLX before it kept a scale": (
        {"adapter_config.json": mlx(), "adapters.safetensors": MLX},
        "lora_parameters is missing or is no object: nothing says rank and scale",
        "kept them in their program",
    ),
    "MLX with fewer layers than its old name for them says": (
        {
            "adapter_config.json": mlx(
                lora_layers=1, lora_parameters={"rank": 2, "scale": 2.0}
            ),
            "adapters.safetensors": tensor_bytes(
                {
                    f"{Q.replace('.0.', f'.{layer}.')}.lora_{which}": ("F32", shape)
                    for layer in (0, 3)
                    for which, shape in (("a", (8, 2)), ("b", (2, 8)))
                }
            ),
        },
        "lora_layers is 1, and the weights reach over 4 layers",
        "",
    ),
    "a whole model": (
        {"model.safetensors": tensor_bytes({f"{Q}.weight": ("F32", (8, 8))})},
        "of a whole model, no factor among them",
        "",
    ),
    "GPT-2's factors that have lost everything around them": (
        {"weights.safetensors": tensor_bytes(factors("transformer.h.0.attn.c_attn"))},
        "nobody knows the scaling of the factors",
        "",
    ),
    "the head of a GGUF file": (
        {"adapter.gguf": b"GGUF\x03\0\0\0"},
        "is no GGUF file that can be read: it ends too early",
        "cut off",
    ),
    "a byte order mark": (
        {"adapter_config.json": b"\xef\xbb\xbf" + config(), WEIGHTS: GOOD},
        "BOM",
        "",
    ),
    "a zero byte behind the config": (
        {"adapter_config.json": config() + b"\0", WEIGHTS: GOOD},
        "Extra data",
        "",
    ),
    "a pickle alone": (
        {"adapter_config.json": config(), "adapter_model.bin": PICKLE},
        "'adapter_model.bin' is a pickle, which can run code and is never read",
        "save it again",
    ),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_base(tmp_path_factory.mktemp("base") / "base")


def commands(folder, base, out):
    fields = ["--name", "tiny-lab/verse", "--version", "1.0.0", "--license", "MIT"]
    fields += ["--task", "text-generation", "--base", str(base), "--out", str(out)]
    return {
        "inspect": ["inspect", str(folder)],
        "convert": ["convert", str(folder), "--to", "peft", "--out", str(out)],
        "pack": ["pack", str(folder), *fields],
    }


@pytest.mark.parametrize("name", REFUSED)
def test_an_odd_folder_is_refused_in_one_line_that_says_what_to_do(
    name, tmp_path, base, capsys
):
    files, problem, hint = REFUSED[name]
    folder, out = tmp_path / "adapter", tmp_path / "out"
    folder.mkdir()
    for file, data in files.items():
        (folder / file).write_bytes(data)

    for arguments in commands(folder, base, out).values():
        assert run(arguments) == 2
        said = capsys.readouterr().err
        line, *rest = said.splitlines()
        assert line.startswith(str(folder))
        assert problem in line
        assert hint in "".join(rest)
        assert not out.exists()
    assert run(["validate", str(folder), "--format", "json"]) == 1
    found = json.loads(capsys.readouterr().out)["findings"]
    assert any(problem in one["message"] for one in found if one["severity"] == "error")


# What trainers put beside an adapter.
BESIDE = {
    "checkpoint-10/adapter_config.json": config(),
    "checkpoint-10/adapter_model.safetensors": GOOD,
    "checkpoint-10/optimizer.pt": PICKLE,
    "training_args.bin": PICKLE,
    "trainer_state.json": b"{}",
    "training_args.yaml": b"a: 1",
    "additional_config.json": b'{"lora_dtype": null}',
    "args.json": b"{}",
}


def test_what_trainers_leave_beside_an_adapter_is_no_fault_of_it(tmp_path, capsys):
    for name, data in (BESIDE | {"adapter_config.json": config(), WEIGHTS: GOOD}).items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)

    assert run(["inspect", str(tmp_path)]) == 0
    capsys.readouterr()
    assert run(["validate", str(tmp_path), "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)["findings"]
    # The pickles, and factors that are zero here.
    assert {one["rule"] for one in found} == {"LH023", "LH031"}


@pytest.mark.parametrize(
    "path",
    ["n" * 300, "/".join(["y" * 200] * 30), "x" * 5000],
    ids=["name", "path", "both"],
)
def test_a_path_that_no_file_can_have_is_bad_input(path, tmp_path, capsys):
    for command in ("validate", "inspect"):
        assert run([command, str(tmp_path / path)]) == 2
        assert capsys.readouterr().err.count("File name too long") == 1


@pytest.mark.parametrize("name", ["adapter_config.json", WEIGHTS])
@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_what_is_no_file_in_the_place_of_one_is_named(name, make, tmp_path, base, capsys):
    for file, data in {"adapter_config.json": config(), WEIGHTS: GOOD}.items():
        (tmp_path / file).write_bytes(data)
    (tmp_path / name).unlink()
    make(tmp_path / name)

    for arguments in commands(tmp_path, base, tmp_path / "out").values():
        assert run(arguments) == 2
        assert f"{tmp_path / name}: is no regular file" in capsys.readouterr().err
    assert run(["validate", str(tmp_path)]) == 1
    assert "is no regular file" in capsys.readouterr().out


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", [".", "adapter_config.json", WEIGHTS])
def test_what_may_not_be_read_is_bad_input(name, tmp_path, base, capsys):
    folder = tmp_path / "adapter"
    folder.mkdir()
    for file, data in {"adapter_config.json": config(), WEIGHTS: GOOD}.items():
        (folder / file).write_bytes(data)
    (folder / name).chmod(0)

    try:
        for arguments in commands(folder, base, tmp_path / "out").values():
            assert run(arguments) == 2
            assert "cannot be read: Permission denied" in capsys.readouterr().err
        assert run(["validate", str(folder)]) in (1, 2)
        assert "cannot be read: Permission denied" in "".join(capsys.readouterr())
    finally:
        (folder / name).chmod(0o700)
