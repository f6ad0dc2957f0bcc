import json
import os
import shutil

import pytest

from lora_hub.errors import DocumentError, FormatError, InputError, TensorFileError
from lora_hub.formats.detect import (
    DIALECTS,
    detect,
    detect_and_read,
    open_adapter,
    source_from_files,
)
from lora_hub.formats.dialect import ReadOptions
from tests import adapters
from tests.builders import tensor_bytes, tiny_adapter

LORA = json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}).encode()
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
WEIGHTS = tensor_bytes(
    {
        "base_model.model.x.lora_A.weight": ("F32", (2, 3)),
        "base_model.model.x.lora_B.weight": ("F32", (3, 2)),
    }
)


def test_opens_what_peft_saved(tmp_path):
    folder = tiny_adapter(tmp_path / "adapter", rank=3, alpha=6)

    source = open_adapter(folder)

    assert len(source.updates) == 4
    assert {update.scaling for update in source.updates} == {2.0}


def test_follows_links_as_download_caches_make_them(tmp_path):
    folder = tiny_adapter(tmp_path / "blobs")
    links = tmp_path / "snapshot"
    links.mkdir()
    for path in folder.iterdir():
        (links / path.name).symlink_to(path)

    assert open_adapter(links).updates


def test_reads_files_without_a_folder():
    files = {"adapter_config.json": LORA, "adapter_model.safetensors": WEIGHTS}

    source = source_from_files(files.__getitem__, files, where="blobs")

    assert [update.target for update in source.updates] == ["x"]


def test_config_that_is_known_speaks_for_no_other_and_for_no_weights():
    files = {"adapter_config.json": LORA, "adapter_model.safetensors": WEIGHTS}
    for _ in range(4):  # what is read is remembered from its second time on
        first = source_from_files(files.__getitem__, files, where="blobs")

    other = json.loads(LORA) | {"lora_alpha": 3}
    files["adapter_config.json"] = json.dumps(other).encode()
    source = source_from_files(files.__getitem__, files, where="blobs")
    files["adapter_config.json"] = LORA
    with pytest.raises(FormatError, match="adapter_model"):
        source_from_files(files.__getitem__, ["adapter_config.json"], where="blobs")

    assert first.updates[0].alpha != source.updates[0].alpha == 3


def test_config_of_a_package_is_read_once():
    files = {"adapter_config.json": LORA, "adapter_model.safetensors": WEIGHTS}
    asked = []

    def read(name):
        asked.append(name)
        return files[name]

    source_from_files(read, files, where="blobs")

    assert sorted(asked) == sorted(files)


def test_never_opens_a_pickle_beside_the_weights():
    files = {"adapter_config.json": LORA, "adapter_model.safetensors": WEIGHTS}

    def read(name):
        assert name in files, f"{name} was read"
        return files[name]

    assert source_from_files(read, [*files, "training_args.bin"], where="blobs").updates


BAD = [
    ({}, FormatError, "no adapter is here"),
    ({"adapter.safetensors": WEIGHTS}, FormatError, "without it nobody knows the scaling"),
    ({"adapter.safetensors": b""}, TensorFileError, "the file has 0 bytes"),
    ({"adapter_model.bin": b""}, FormatError, "'adapter_model.bin' is a pickle"),
    ({"adapter_config.json": LORA}, FormatError, "no adapter_model.safetensors"),
    (
        {"adapter_config.json": LORA, "adapter_model.bin": b""},
        FormatError,
        "'adapter_model.bin' is a pickle, which can run code",
    ),
    (
        {"adapter_config.json": LORA, "a.safetensors": b"", "b.safetensors": b""},
        FormatError,
        "found 'a.safetensors', 'b.safetensors'",
    ),
    (
        {"adapter_config.json": b'{"fine_tune_type":"lora","num_layers":4}'},
        FormatError,
        "there is no adapters.safetensors",
    ),
    (
        {"adapter_config.json": b'{"model_class":"X","model_type":"bert","config":{}}'},
        FormatError,
        "the config is AdapterHub's",
    ),
    ({"adapter_config.json": b'{"r":8}'}, FormatError, "it names no peft_type"),
    (
        {"adapter_config.json": b'{"peft_type":"PREFIX_TUNING"}', "adapter_model.bin": b""},
        FormatError,
        "peft_type is 'PREFIX_TUNING'",
    ),
    ({"adapter_config.json": LFS}, DocumentError, "Git LFS pointer"),
    ({"adapter_config.json": b"{"}, DocumentError, "not JSON"),
    ({"adapter_config.json": b'{"r":1,"r":2}'}, DocumentError, "'r' stands twice"),
    (
        {"adapter_config.json": LORA, "adapter_model.safetensors": LFS},
        TensorFileError,
        "Git LFS pointer",
    ),
    (
        {"adapter_config.json": LORA, "adapter_model.safetensors": b"ab"},
        TensorFileError,
        "the file has 2 bytes",
    ),
    (
        {"adapter_config.json": LORA, "adapter_model.safetensors": WEIGHTS + b"x"},
        TensorFileError,
        "1 bytes follow the last tensor",
    ),
]


@pytest.mark.parametrize(("files", "error_class", "problem"), BAD)
def test_what_is_no_adapter_is_refused_by_name(files, error_class, problem, tmp_path):
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)

    with pytest.raises(error_class) as error:
        open_adapter(tmp_path)

    assert problem in error.value.problem
    assert str(tmp_path) in error.value.where


def test_missing_folder_and_file_in_place_of_a_folder_are_told_apart(tmp_path):
    (tmp_path / "file").touch()

    with pytest.raises(InputError, match="no such folder"):
        open_adapter(tmp_path / "nothing")
    with pytest.raises(InputError, match="this is a file"):
        open_adapter(tmp_path / "file")


def test_named_pipe_in_place_of_the_config_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "adapter_config.json")

    with pytest.raises(InputError, match="no regular file"):
        open_adapter(tmp_path)


def test_unreadable_file_is_an_input_error(tmp_path):
    folder = tiny_adapter(tmp_path / "adapter")
    shutil.rmtree(tmp_path / "gone", ignore_errors=True)
    (folder / "adapter_config.json").unlink()
    (folder / "adapter_config.json").symlink_to(tmp_path / "gone")

    with pytest.raises(InputError, match="no regular file"):
        open_adapter(folder)


def fill(folder, files):
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def example(dialect, tmp_path):
    """Return the files of an adapter that the dialect can say, and the base it needs."""
    if dialect in ("kohya", "diffusers"):
        adapter = adapters.source(adapters.part(adapters.TO_Q))
        return adapters.written(dialect, adapter), adapters.pipeline_base(tmp_path / "base")
    base = adapters.language_base(tmp_path / "base")
    return adapters.written(
        dialect, adapters.source(adapters.part(adapters.Q0)), base
    ), base


EVIDENCE = {
    "peft": "adapter_config.json names peft_type 'LORA'",
    "mlx": "adapter_config.json names fine_tune_type and lora_parameters",
    "kohya": "every tensor is named lora_unet_… or lora_te…; its header names "
    "ss_network_module 'networks.lora'",
    "diffusers": "its header holds lora_adapter_metadata",
    "loralib": "every tensor is named ….lora_A or ….lora_B",
    "gguf": "it begins with the bytes GGUF",
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_what_a_dialect_writes_is_detected_with_evidence_and_opened(dialect, tmp_path):
    files, base = example(dialect, tmp_path)
    folder = tmp_path / "adapter"
    folder.mkdir()
    fill(folder, files)

    found = detect(folder)
    source = open_adapter(folder, ReadOptions(base=base, alpha=4.0))

    assert (found.dialect.name, found.evidence) == (dialect, (EVIDENCE[dialect],))
    assert [update.scaling for update in source.updates] == [2.0]


def test_the_only_weights_beside_a_config_are_the_adapters_whatever_their_name(tmp_path):
    name = "Copy of adapter_model.safetensors"
    fill(tmp_path, {"adapter_config.json": LORA, name: WEIGHTS})

    found, source = detect_and_read(tmp_path)

    assert found.weights_name == name
    assert found.evidence[1] == f"{name!r} is the only file of weights beside it"
    assert [update.scaling for update in source.updates] == [1.0]


def test_file_of_weights_may_be_given_in_place_of_its_folder(tmp_path):
    name = "Copy of adapter_model.safetensors"
    fill(tmp_path, {"adapter_config.json": LORA, name: WEIGHTS, "more.safetensors": b"no"})

    source = open_adapter(tmp_path / name)

    assert [update.target for update in source.updates] == ["x"]


def test_config_of_two_dialects_is_asked_about(tmp_path):
    both = json.loads(LORA) | {"fine_tune_type": "lora"}
    fill(tmp_path, {"adapter_config.json": json.dumps(both).encode()})
    fill(tmp_path, {"adapter_model.safetensors": WEIGHTS})

    with pytest.raises(FormatError) as error:
        open_adapter(tmp_path)

    assert "can be read as PEFT's: adapter_config.json names" in error.value.problem
    assert "or as MLX-LM's: adapter_config.json names" in error.value.problem
    assert error.value.hint.endswith("--from: peft or mlx")
    with pytest.raises(FormatError, match="'fine_tune_type' is not known"):
        open_adapter(tmp_path, dialect="peft")


def test_several_adapters_in_a_folder_are_asked_about(tmp_path):
    one, _ = example("kohya", tmp_path / "1")
    two, _ = example("diffusers", tmp_path / "2")
    fill(tmp_path, one | two)

    with pytest.raises(FormatError, match="there are several adapters: "):
        detect(tmp_path)

    assert detect(tmp_path / "lora.safetensors").dialect.name == "kohya"


def test_model_beside_an_adapter_is_not_taken_for_one(tmp_path):
    files, _ = example("kohya", tmp_path / "1")
    model = tensor_bytes({"conv.weight": ("F32", (2, 3))})
    fill(tmp_path, files | {"model.safetensors": model})

    assert detect(tmp_path).weights_name == "lora.safetensors"


NAMES = [
    ("w_a_000", "home-made, without paths of modules"),
    ("diffusion_model.x.lora_A.weight", "ComfyUI's for a model other than FLUX.1"),
    ("lora_transformer_x.lora_A.weight", "ComfyUI's for a model other than FLUX.1"),
    ("bert.loras.x.lora_A", "AdapterHub's, which is not read"),
    ("bert.adapters.x.adapter_down.0.weight", "AdapterHub's, which is not read"),
    ("model.layers.0.adapter.linear_in.weight", "NeMo's or Megatron's"),
    ("layers.0.attn.q_proj.w_lora_a", "of qwix or tunix (JAX)"),
    ("prompt_embeddings", "of prompt or prefix tuning"),
    ("model.layers.0.q.lora_A.weight", "of no dialect that is read"),
    ("x.lora_a", "there is no adapter_config.json beside it"),
]


@pytest.mark.parametrize(("name", "problem"), NAMES)
def test_names_that_are_not_read_are_refused_by_name(name, problem, tmp_path):
    tensors = {name: ("F32", (2, 3)), name.replace("_a", "_b"): ("F32", (3, 2))}
    fill(tmp_path, {"x.safetensors": tensor_bytes(tensors)})

    with pytest.raises(FormatError) as error:
        open_adapter(tmp_path)

    assert problem in error.value.problem


def test_weights_without_tensors_are_refused(tmp_path):
    fill(tmp_path, {"x.safetensors": tensor_bytes({})})

    with pytest.raises(FormatError, match="holds no tensors"):
        open_adapter(tmp_path)


def test_package_is_read_as_peft_whatever_else_it_could_be():
    files = {"adapter_config.json": b'{"fine_tune_type":"lora"}'}

    with pytest.raises(FormatError, match="names no peft_type"):
        source_from_files(files.__getitem__, files, where="blobs")
