"""`lorahub registry`: make one, check one."""

from pathlib import Path

import click

from lora_hub.cli import options, terminal


@click.group()
def command() -> None:
    """Make or check a registry."""


@command.command()
@click.argument("folder", type=options.FOLDER)
@click.option(
    "--name", metavar="NAME", help="What it calls itself.  [default: the folder's name]"
)
@options.as_json
def init(folder: Path, name: str | None, as_json: bool) -> None:
    """Make FOLDER a registry."""
    from lora_hub.public import publishing

    registry = publishing.init_registry(folder, name=name or folder.resolve().name)
    if as_json:
        terminal.out_json({"folder": folder, "name": registry.config.name})
    else:
        terminal.out(f"{folder} is the registry {registry.config.name!r}")


@command.command()
@click.argument("folder", required=False)
@options.as_json
def check(folder: str | None, as_json: bool) -> int:
    """Read a whole registry: every event, key, blob, manifest and signature.

    Exit code 0: sound; 1: problems.
    """
    from lora_hub.public.find import open_registry
    from lora_hub.registry.check import check as run

    registry = open_registry(folder)
    problems = run(registry)
    names = list(registry.names())
    if as_json:
        terminal.out_json({"names": names, "problems": problems})
        return 1 if problems else 0
    terminal.problems(problems)
    terminal.out(f"{registry.where}: {len(names)} names, {len(problems)} problems")
    return 1 if problems else 0
