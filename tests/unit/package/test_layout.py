import os

import pytest

from lora_hub.errors import FormatError, InputError, IntegrityError
from lora_hub.package import layout


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("adapter_config.json", "config"),
        ("adapter_model.safetensors", "weights"),
        ("README.md", "card"),
        ("LICENSE", "license"),
        ("LICENSE.txt", "license"),
        ("LICENCE-weights.md", "license"),
        ("NOTICE", "license"),
        ("tokenizer.json", "tokenizer"),
        ("chat_template.jinja", "tokenizer"),
        ("lorahub.json", None),
        ("model.sig", None),
        ("adapter_model.bin", None),
        ("LICENSED", None),
        ("modeling.py", None),
    ],
)
def test_every_name_has_one_role_or_none(name, role):
    assert layout.role_of(name) == role


def test_plain_names_may_stand_together():
    layout.check_names(["README.md", "LICENSE", "a.b-c_d", "_x"], where="here")


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (["../../etc/passwd"], "no name for a file"),
        (["a/b"], "no name for a file"),
        (["a\\b"], "no name for a file"),
        (["C:x"], "no name for a file"),
        (["a%2fb"], "no name for a file"),
        ([".hidden"], "no name for a file"),
        (["trailing."], "no name for a file"),
        (["trailing "], "no name for a file"),
        (["new\nline"], "no name for a file"),
        (["README.md\n"], "no name for a file"),
        (["caf\u00e9"], "no name for a file"),
        (["\u202egpj.exe"], "no name for a file"),
        ([""], "no name for a file"),
        (["x" * 121], "no name for a file"),
        (["con"], "a device on Windows"),
        (["NUL.txt"], "a device on Windows"),
        (["com1.json"], "a device on Windows"),
        (["README.md", "readme.MD"], "differ in case alone"),
        ([f"f{n}" for n in range(257)], "at most 255"),
    ],
)
def test_names_that_mean_trouble_somewhere_are_refused(names, problem):
    with pytest.raises(FormatError, match=problem):
        layout.check_names(names, where="here")


def test_lists_regular_files_and_passes_over_what_git_keeps(tmp_path):
    (tmp_path / "b").touch()
    (tmp_path / "a").touch()
    (tmp_path / "model.sig").touch()
    (tmp_path / ".git").mkdir()
    (tmp_path / ".gitattributes").touch()

    assert layout.list_files(tmp_path) == ("a", "b", "model.sig")


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda path: path.symlink_to("/etc/passwd"), "symbolic link"),
        (lambda path: path.mkdir(), "folder"),
        (os.mkfifo, "named pipe"),
    ],
)
def test_anything_but_a_regular_file_was_put_there_by_somebody(make, kind, tmp_path):
    make(tmp_path / "extra")

    with pytest.raises(IntegrityError, match=f"a {kind} lies in the package"):
        layout.list_files(tmp_path)
    with pytest.raises(InputError):
        layout.read_file(tmp_path, "extra", 100)


def test_reads_no_more_than_the_limit(tmp_path):
    (tmp_path / "file").write_bytes(b"12345")

    assert layout.read_file(tmp_path, "file", 5) == b"12345"
    with pytest.raises(InputError, match="has 5 bytes, at most 4 are read"):
        layout.read_file(tmp_path, "file", 4)


def test_missing_folder_and_file_are_input_errors(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        layout.list_files(tmp_path / "nothing")
    with pytest.raises(InputError, match="cannot be read"):
        layout.read_file(tmp_path, "nothing", 5)
