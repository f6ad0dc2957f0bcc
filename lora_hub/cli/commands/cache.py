"""`lorahub cache`: pulled packages."""

import click

from lora_hub.cli import options, terminal

DAY_S = 24 * 3600


@click.group()
def command() -> None:
    """List, verify or prune pulled packages."""


@command.command("list")
@options.as_json
def list_packages(as_json: bool) -> None:
    """Print every package in the cache."""
    from lora_hub.registry.cache import Cache

    cached = Cache().list()
    if as_json:
        terminal.out_json(cached)
        return
    terminal.table(
        [
            (each.package, terminal.size(each.size_bytes), str(each.folder))
            for each in cached
        ]
    )


@command.command()
@options.as_json
def verify(as_json: bool) -> int:
    """Read every byte of the cache and compare it with its digest."""
    from lora_hub.registry.cache import Cache

    cache = Cache()
    problems = cache.verify()
    if as_json:
        terminal.out_json({"packages": len(cache.list()), "problems": problems})
        return 1 if problems else 0
    terminal.problems(problems)
    terminal.talk(f"{len(cache.list())} packages, {len(problems)} problems")
    return 1 if problems else 0


@command.command()
@click.option(
    "--days",
    type=click.IntRange(min=0),
    default=30,
    show_default=True,
    help="Unused for so many days.",
)
@options.as_json
def prune(days: int, as_json: bool) -> None:
    """Remove packages that are damaged or were not used lately, and half-made ones."""
    from lora_hub.registry.cache import Cache

    pruned = Cache().prune(unused_s=days * DAY_S)
    if as_json:
        terminal.out_json(pruned)
        return
    terminal.out(f"removed {pruned.packages} packages, {terminal.size(pruned.size_bytes)}")
