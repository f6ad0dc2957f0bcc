"""Options that several commands share, so that they are spelt and explained alike."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

Function = TypeVar("Function", bound=Callable[..., Any])
FOLDER = click.Path(file_okay=False, path_type=Path)
PATH = click.Path(path_type=Path)


def registry(function: Function) -> Function:
    """Add `--registry`."""
    return click.option(
        "--registry",
        metavar="R",
        help="A folder, or a name from config.toml. Default: LORAHUB_REGISTRY.",
    )(function)


# As in `formats/detect.py`, which is not imported for a help text; a test compares them.
DIALECTS = ["peft", "mlx", "kohya", "diffusers", "loralib", "gguf"]


def reading(function: Function) -> Function:
    """Add what an adapter's files may leave open: `--from`, `--scale-from`, `--alpha`."""
    for option in (
        click.option("--alpha", type=float, help="The lora_alpha of a loralib file."),
        click.option(
            "--scale-from",
            type=click.Choice(["alpha", "scale"]),
            help="Which number holds where an MLX config has both.",
        ),
        click.option(
            "--from",
            "from_",
            type=click.Choice(DIALECTS),
            help="What the adapter's files are, where two dialects could be meant.",
        ),
    ):
        function = option(function)
    return function


def as_json(function: Function) -> Function:
    """Add `--json`."""
    return click.option(
        "--json", "as_json", is_flag=True, help="Print one JSON document instead of text."
    )(function)


def base(function: Function) -> Function:
    """Add `--base`."""
    return click.option(
        "--base",
        required=True,
        type=FOLDER,
        help="The folder of the base: config.json and safetensors.",
    )(function)
