"""Options that several commands share, so that they are spelt and explained alike."""

import functools
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


def reading(*, with_base: bool = True) -> Callable[[Function], Callable[..., Any]]:
    """Add what an adapter's files may leave open; the command gets it as one `how`.

    That is a mapping of the arguments `from_`, `scale_from`, `alpha`, `enable_lora`,
    `initial` and `base` that functions of `public/` take, those that were given.

    Args:
        with_base: whether `--base` is among them; a command that needs it has its own.
    """
    names = ["from_", "scale_from", "alpha", "enable_lora", "initial"]
    if with_base:
        names.append("base")

    def add(function: Function) -> Callable[..., Any]:
        @functools.wraps(function)
        def command(**said: Any) -> Any:
            how = {name: value for name in names if (value := said.pop(name)) is not None}
            return function(how=how, **said)

        for option in _READING if with_base else _READING[1:]:
            command = option(command)
        return command

    return add


def flags(
    context: click.Context, parameter: click.Parameter, text: str | None
) -> tuple[bool, ...] | None:
    """Return what `1,0,1` means; None where nothing was given."""
    words = [] if text is None else text.split(",")
    if not set(words) <= {"0", "1"}:
        raise click.BadParameter("give 0 or 1 for each part, as in 1,0,1")
    return None if text is None else tuple(word == "1" for word in words)


# In the order in which decorators add them: the last stands first in a help text.
_READING = (
    click.option(
        "--base",
        type=FOLDER,
        help="The folder of the base: kohya, gguf and some of VeRA and loralib need its "
        "names.",
    ),
    click.option(
        "--initial",
        type=FOLDER,
        help="The folder of the factors before training (PiSSA, OLoRA, CorDA).",
    ),
    click.option(
        "--enable-lora",
        metavar="FLAGS",
        callback=flags,
        help="Which parts of a merged layer a loralib file adapts, q, k and v: 1,0,1.",
    ),
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
)


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
