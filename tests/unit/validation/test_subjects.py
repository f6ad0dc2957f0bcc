"""What `validate` looks at in a repository, and what it passes over."""

import os

import pytest

from lora_hub.errors import InputError
from lora_hub.validation import subjects
from lora_hub.validation.subjects import subjects_of


def adapter(folder):
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    return folder


def found(path):
    return [
        folder.relative_to(path).as_posix() for folder in subjects_of(path, lambda _: False)
    ]


def test_adapters_and_packages_below_are_found_in_order_of_names(tmp_path):
    for name in ("b", "a/z", "a/b/c", "a-b"):
        adapter(tmp_path / name)
    (tmp_path / "c/d").mkdir(parents=True)
    (tmp_path / "c/d/lorahub.json").touch()

    assert found(tmp_path) == ["a/b/c", "a/z", "a-b", "b", "c/d"]


@pytest.mark.parametrize("name", [".git", ".venv", "node_modules", "__pycache__"])
def test_what_tools_put_there_is_passed_over_unless_it_is_named(name, tmp_path):
    adapter(tmp_path / name / "deep/inside")
    adapter(tmp_path / "mine")

    assert found(tmp_path) == ["mine"]
    assert found(tmp_path / name) == ["deep/inside"]


def test_environment_of_python_is_passed_over_whatever_its_name(tmp_path):
    adapter(tmp_path / "env/lib/site-packages/peft/tests/adapter")
    (tmp_path / "env/pyvenv.cfg").touch()
    adapter(tmp_path / "mine")

    assert found(tmp_path) == ["mine"]


def test_what_lies_in_an_adapter_is_that_adapters(tmp_path):
    adapter(tmp_path / "mine")
    adapter(tmp_path / "mine/checkpoint-100")

    assert found(tmp_path) == ["mine"]


def test_links_are_not_followed_and_loops_end(tmp_path):
    adapter(tmp_path / "outside/adapter")
    adapter(tmp_path / "repo/mine")
    (tmp_path / "repo/out").symlink_to("../outside")
    (tmp_path / "repo/mine-too").symlink_to("mine")
    (tmp_path / "repo/loop").symlink_to("..")
    (tmp_path / "repo/self").symlink_to("self")

    assert found(tmp_path / "repo") == ["mine"]


def test_adapters_are_found_however_deep(tmp_path):
    deep = tmp_path.joinpath(*"abcdefghijklmnopqrstuvwxyz")
    adapter(deep)

    assert subjects_of(tmp_path, lambda _: False) == (deep,)


def test_more_folders_than_are_looked_through_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(subjects, "MAX_FOLDERS", 4)
    for number in range(9):
        adapter(tmp_path / f"adapters/{number}")

    few = subjects_of(tmp_path, lambda _: False)
    for number in range(3):
        (tmp_path / f"others/{number}").mkdir(parents=True)

    assert len(few) == 9
    with pytest.raises(InputError, match="more than 4 folders without an adapter"):
        subjects_of(tmp_path, lambda _: False)


def test_folder_whose_path_is_too_long_is_refused_and_not_passed_over(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)  # and back at the end
    for _ in range(45):
        os.mkdir("d" * 100)
        os.chdir("d" * 100)

    with pytest.raises(InputError, match="cannot be read"):
        subjects_of(tmp_path, lambda _: False)
