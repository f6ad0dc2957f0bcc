"""Adapters that other people published: what each is, or the message that it gets.

Where they come from stands in each folder of tests/assets/wild.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from lora_hub.errors import FormatError
from lora_hub.formats.detect import detect, open_adapter
from lora_hub.formats.dialect import ReadOptions
from tests import adapters

WILD = Path(__file__).parents[2] / "assets/wild"
MLX = WILD / "mlx-example/0000200_adapters.safetensors"


@pytest.mark.parametrize(
    ("file", "targets", "rank", "scaling"),
    [
        ("gpt-neo-movies/Copy of adapter_model.safetensors", 24, 8, 2.0),
        ("gpt2-chatbot/model.safetensors", 12, 8, 4.0),
    ],
)
def test_weights_under_odd_names_are_read_when_the_file_is_named(
    file, targets, rank, scaling
):
    source = open_adapter(WILD / file)

    assert len(source.updates) == targets
    assert {(u.rank, u.scaling) for u in source.updates} == {(rank, scaling)}


@pytest.mark.parametrize(
    ("folder", "problem"),
    [
        ("gpt-neo-movies", "found 'Copy of adapter_model.safetensors'"),
        ("gpt2-chatbot", "found 'model.safetensors'"),
        ("mlx-example", "found '0000200_adapters.safetensors'"),
        ("sam-w_a-w_b", "('w_a_000', …) are home-made, without paths of modules"),
        ("privacy-filter-token-cls", "modules_to_save is ['classifier', 'score']"),
    ],
)
def test_folder_that_is_not_read_is_refused_by_name(folder, problem):
    with pytest.raises(FormatError) as error:
        open_adapter(WILD / folder)

    assert problem in error.value.problem


def test_mlx_with_two_numbers_is_asked_about_and_never_guessed():
    with pytest.raises(FormatError) as error:
        open_adapter(MLX)

    assert (
        "scale (10), its first versions by scale · alpha/rank (20)" in error.value.problem
    )
    assert "--scale-from" in error.value.hint


@pytest.mark.parametrize(("said", "scaling"), [("scale", 10.0), ("alpha", 20.0)])
def test_mlx_is_read_when_the_caller_says_which(said, scaling):
    source = open_adapter(MLX, ReadOptions(scale_from=said))

    held = adapters.tensors_of(MLX.read_bytes())
    assert detect(MLX).evidence == (
        "adapter_config.json names fine_tune_type and lora_parameters",
    )
    assert [u.target.split(".")[2] for u in source.updates[::2]] == ["20", "21", "22", "23"]
    for target, delta in adapters.deltas(source).items():
        a, b = (adapters.float64(*held[f"{target}.lora_{which}"]) for which in "ab")
        np.testing.assert_array_equal(delta, scaling * (b.T @ a.T))


def test_every_folder_says_where_it_comes_from_and_its_licence():
    for folder in WILD.iterdir():
        text = (folder / "README.md").read_text()

        assert "Origin: GitHub" in text, folder
        assert "Licence:" in text, folder


def test_the_users_path_was_replaced():
    config = json.loads((WILD / "mlx-example/adapter_config.json").read_text())

    assert config["model"] == "/Users/someone/models/base"
