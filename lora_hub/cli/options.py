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
