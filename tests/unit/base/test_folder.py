"""A checkpoint folder as a base: digests, their cache, and what a manifest says of it."""

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_hub.base import digest_cache
from lora_hub.base.folder import FolderBase, config_of, describe, tokenizer_of
from lora_hub.base.view import digests, root_of, struct_of
from lora_hub.errors import DocumentError, FitError, InputError
from lora_hub.manifest.document import BaseConfig

ROOT = Path(__file__).parents[3]
Q = "model.layers.0.self_attn.q_proj"


def root(folder: Path) -> str | None:
    with FolderBase.open(folder) as view:
        return root_of(view)


def struct(folder: Path) -> str:
    with FolderBase.open(folder) as view:
        return struct_of(view)


def sha(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def test_the_root_does_not_depend_on_files_and_order(make_base):
    one, many = make_base("one"), make_base("many", shards=5)

    assert root(one) == root(many)
    assert struct(one) == struct(many)


def test_a_copy_in_another_dtype_has_another_root_and_the_same_structure(make_base):
    one, copy = make_base("one"), make_base("copy", dtype=torch.float16)

    assert root(one) != root(copy)
    assert struct(one) == struct(copy)


def test_one_changed_weight_changes_the_root(make_base):
    one, other = (
        make_base("one"),
        make_base("other", change=("model.layers.2.norm.weight",)),
    )

    assert root(one) != root(other)
    assert struct(one) == struct(other)


def test_digests_are_those_of_the_tensors_bytes(make_base):
    folder = make_base("one")
    weights = load_file(folder / "model.safetensors")

    with FolderBase.open(folder) as view:
        found = digests(view, [(name, None) for name in weights])

    assert found == [sha(bytes_of(tensor)) for tensor in weights.values()]


def test_a_widened_tensor_has_the_digest_it_had_before(make_base):
    narrow, wide = make_base("narrow"), make_base("wide", dtype=torch.float32)
    name = f"{Q}.weight"

    with FolderBase.open(narrow) as before, FolderBase.open(wide) as after:
        assert after.digest(name, "BF16") == before.digest(name)
        assert after.digest(name) != before.digest(name)
        assert root_of(after, "BF16") == root_of(before)


def test_a_tensor_that_was_not_widened_has_no_digest_in_another_dtype(make_base):
    wide = make_base("wide", dtype=torch.float32)
    path = wide / "model.safetensors"
    save_file({key: t + 1e-7 for key, t in load_file(path).items()}, path)

    with FolderBase.open(wide) as view:
        assert view.digest(f"{Q}.weight", "BF16") is None
        assert root_of(view, "BF16") is None


@pytest.mark.parametrize("as_dtype", ["F32", "F16", "I8"])
def test_nothing_is_said_to_be_narrowed_that_is_not_wider(make_base, as_dtype):
    with FolderBase.open(make_base("one")) as view:
        assert view.digest(f"{Q}.weight", as_dtype) is None


@pytest.fixture
def counted(monkeypatch):
    """Return a list that grows by the name of each tensor hashed."""
    hashed = []
    really = FolderBase._hash

    def _hash(self, name, dtype, wanted):
        hashed.append(name)
        return really(self, name, dtype, wanted)

    monkeypatch.setattr(FolderBase, "_hash", _hash)
    return hashed


def test_digests_are_kept_between_runs(make_base, tmp_path, counted):
    folder, cache = make_base("one", shards=2), tmp_path / "cache"

    with FolderBase.open(folder, cache) as view:
        first = root_of(view)
        assert len(counted) == len(view.tensors)
    with FolderBase.open(folder, cache) as view:
        assert root_of(view) == first

        assert len(counted) == len(view.tensors)
    assert len(list(cache.iterdir())) == 2


def test_a_tensor_is_hashed_once_in_a_run(make_base, counted):
    with FolderBase.open(make_base("one")) as view:
        assert view.digest(f"{Q}.weight") == view.digest(f"{Q}.weight")

    assert len(counted) == 1


def test_a_changed_file_is_hashed_again(make_base, tmp_path):
    folder, cache = make_base("one"), tmp_path / "cache"
    path = folder / "model.safetensors"
    with FolderBase.open(folder, cache) as view:
        before = root_of(view)
    times = path.stat().st_mtime_ns
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(times + 1, times + 1))

    with FolderBase.open(folder, cache) as view:
        assert root_of(view) != before


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"schema": "lorahub.base-digests/1"}',
        '{"schema": "lorahub.base-digests/1", "digests": []}',
        '{"schema": "lorahub.base-digests/1", "digests": {"BF16": []}}',
        '{"schema": "lorahub.base-digests/1", "digests": {"BF16": {"x": 1}}}',
        '{"schema": "lorahub.base-digests/9", "digests": {}}',
    ],
)
def test_a_broken_cache_is_written_anew(make_base, tmp_path, text):
    folder, cache = make_base("one"), tmp_path / "cache"
    with FolderBase.open(folder, cache) as view:
        expected = root_of(view)
    [path] = cache.iterdir()
    whole = path.read_text()
    path.write_text(text)

    with FolderBase.open(folder, cache) as view:
        assert root_of(view) == expected

    assert path.read_text() == whole


def test_a_cache_that_cannot_be_written_is_no_error(make_base, tmp_path):
    (tmp_path / "file").write_text("")

    with FolderBase.open(make_base("one"), tmp_path / "file" / "cache") as view:
        assert root_of(view)


def test_the_cache_gives_back_what_it_was_given(tmp_path):
    known = {"BF16": {"a": sha(b"a")}, "F32": {"a": sha(b"b")}}

    digest_cache.save(tmp_path, (1, 2, 3, 4), known)

    assert digest_cache.load(tmp_path, (1, 2, 3, 4)) == known
    assert digest_cache.load(tmp_path, (1, 2, 3, 5)) == {}


def test_describes_a_base_for_a_manifest(make_base):
    folder = make_base("one", vocab_size=11)
    weights = load_file(folder / "model.safetensors")

    with FolderBase.open(folder) as view:
        base = describe(view, [Q, "model.layers.1.self_attn.v_proj"])

    assert base.root == root(folder)
    assert base.struct == struct(folder)
    assert [target.module for target in base.targets] == [
        Q,
        "model.layers.1.self_attn.v_proj",
    ]
    assert base.targets[0].shape == (8, 8)
    assert base.targets[0].dtype == "BF16"
    assert base.targets[0].sha256 == sha(bytes_of(weights[f"{Q}.weight"]))
    assert base.config.num_layers == 3
    assert base.tokenizer is None
    assert base.policy == "targets"


def test_describe_refuses_a_target_that_is_not_there(make_base):
    with (
        FolderBase.open(make_base("one")) as view,
        pytest.raises(FitError, match=r"no tensor model\.lm_head\.weight"),
    ):
        describe(view, [Q, "model.lm_head"])


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, BaseConfig()),
        (
            {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12},
            BaseConfig(model_type="gpt2", hidden_size=768, num_layers=12, num_heads=12),
        ),
        (
            {
                "model_type": "gemma3",
                "text_config": {"num_hidden_layers": 4, "model_type": "t"},
            },
            BaseConfig(model_type="gemma3", num_layers=4),
        ),
        ({"rope_theta": 10000}, BaseConfig(rope_theta=10000.0)),
        ({"rope_parameters": {"rope_theta": 1e5}}, BaseConfig(rope_theta=1e5)),
        (
            {"text_config": {"rope_parameters": {"rope_theta": 1e6}}},
            BaseConfig(rope_theta=1e6),
        ),
        (
            {"num_hidden_layers": True, "hidden_size": "8", "model_type": 3},
            BaseConfig(),
        ),
        ({"architectures": ["A", 3], "text_config": []}, BaseConfig(architectures=("A",))),
        ({"architectures": "A"}, BaseConfig()),
        ({"tie_word_embeddings": False}, BaseConfig(tie_word_embeddings=False)),
    ],
)
def test_takes_from_a_config_what_a_person_wants_to_hear(config, expected):
    assert config_of(config) == expected


def test_a_config_of_transformers_is_understood():
    from transformers import GPT2Config, LlamaConfig

    llama = config_of(LlamaConfig(num_hidden_layers=7, rope_theta=5e5).to_dict())
    gpt2 = config_of(GPT2Config(n_layer=5).to_dict())

    assert (llama.model_type, llama.num_layers, llama.rope_theta) == ("llama", 7, 5e5)
    assert (gpt2.model_type, gpt2.num_layers, gpt2.hidden_size) == ("gpt2", 5, 768)


def tokenizer_file(folder: Path, model: object, added: object = ()) -> bytes:
    data = json.dumps({"model": model, "added_tokens": added}).encode()
    (folder / "tokenizer.json").write_bytes(data)
    return data


def test_a_folder_without_a_tokenizer_has_none(tmp_path):
    assert tokenizer_of(tmp_path) is None


def test_the_library_counts_the_vocabulary_alike(tmp_path):
    from tokenizers import Tokenizer, models

    theirs = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<s>": 2}, unk_token="a"))
    theirs.add_special_tokens(["<s>", "</s>"])
    theirs.save(str(tmp_path / "tokenizer.json"))

    ours = tokenizer_of(tmp_path)

    assert ours is not None
    assert ours.vocab_size == theirs.get_vocab_size() == 4


@pytest.mark.parametrize(
    ("model", "added", "size"),
    [
        ({"vocab": [["a", -1.0], ["b", -2.0]]}, [{"id": 2}], 3),
        ({"vocab": {"a": 0}}, None, 1),
        ({"vocab": {"a": [0]}}, [7, {"id": {}}], 0),
        ({}, [], None),
        ([], [], None),
    ],
)
def test_counts_the_vocabulary(tmp_path, model, added, size):
    data = tokenizer_file(tmp_path, model, added)

    found = tokenizer_of(tmp_path)

    assert found is not None
    assert (found.sha256, found.vocab_size) == (sha(data), size)


def test_the_chat_template_is_the_file_or_else_that_of_the_config(tmp_path):
    tokenizer_file(tmp_path, {})

    def template():
        found = tokenizer_of(tmp_path)
        assert found is not None
        return found.chat_template_sha256

    assert template() is None
    config = tmp_path / "tokenizer_config.json"
    config.write_text('{"chat_template": [{"name": "default"}]}')
    assert template() is None
    config.write_text('{"chat_template": "{{ messages }}"}')
    assert template() == sha(b"{{ messages }}")
    (tmp_path / "chat_template.jinja").write_text("{{ other }}")
    assert template() == sha(b"{{ other }}")


def test_a_broken_tokenizer_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")

    with pytest.raises(DocumentError) as caught:
        tokenizer_of(tmp_path)

    assert str(caught.value.where).endswith("tokenizer.json")


@pytest.mark.base
def test_the_real_base_has_one_root_in_one_file_and_in_five(tmp_path):
    weights = load_file(ROOT / "build" / "base" / "model.safetensors")
    names = sorted(weights, reverse=True)
    weight_map = {}
    for n in range(5):
        file_name = f"model-{n}.safetensors"
        save_file({name: weights[name] for name in names[n::5]}, tmp_path / file_name)
        weight_map |= dict.fromkeys(names[n::5], file_name)
    index = json.dumps({"weight_map": weight_map})
    (tmp_path / "model.safetensors.index.json").write_text(index)
    half = tmp_path / "half"
    half.mkdir()
    save_file({key: t.half() for key, t in weights.items()}, half / "model.safetensors")

    base = ROOT / "build" / "base"
    assert root(tmp_path) == root(base)
    assert root(half) != root(base)
    assert struct(tmp_path) == struct(half) == struct(base)


def test_a_pipe_as_the_tokenizer_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "tokenizer.json")

    with pytest.raises(InputError, match="no regular file"):
        tokenizer_of(tmp_path)


def test_further_tensors_are_told_by_their_names(tmp_path):
    weights = {
        "lin.weight": torch.randn(4, 3),
        "lin.bias": torch.randn(4),
        "experts.up": torch.randn(2, 4, 3),
        "bare": torch.randn(3),
    }
    save_file(weights, tmp_path / "model.safetensors")

    with FolderBase.open(tmp_path) as view:
        base = describe(
            view, ["lin"], also=["bare", "experts.up", "lin.bias", "lin.weight"]
        )

    assert [(one.module, one.tensor, one.name) for one in base.targets] == [
        ("lin", None, "lin.weight"),
        ("bare", "bare", "bare"),
        ("experts", "experts.up", "experts.up"),
        ("lin", "lin.bias", "lin.bias"),
    ]
    assert [one.sha256 for one in base.targets] == [
        sha(bytes_of(weights[one.name])) for one in base.targets
    ]
