"""`lorahub search`: find adapters from the index alone."""

import click

from lora_hub.cli import options, terminal


@click.command()
@click.argument("words", nargs=-1)
@click.option(
    "--base", metavar="BASE", help="Made for this base: a folder or a root digest."
)
@click.option("--task", metavar="TASK", help="Such as text-generation.")
@click.option(
    "--max-rank", type=click.IntRange(min=1), metavar="N", help="The highest rank."
)
@options.registry
@options.as_json
def command(
    words: tuple[str, ...],
    base: str | None,
    task: str | None,
    max_rank: int | None,
    registry: str | None,
    as_json: bool,
) -> None:
    """Find adapters whose name, summary, task or targets hold all WORDS."""
    from lora_hub.public import packaging
    from lora_hub.public.find import open_registry
    from lora_hub.registry.search import search

    root = base
    if base is not None and not base.startswith("sha256:"):
        root = packaging.fingerprint(base).root
    found = search(
        open_registry(registry), words, base_root=root, task=task, max_rank=max_rank
    )
    if as_json:
        terminal.out_json([entry.event for entry in found])
        return
    terminal.table(
        [
            (
                entry.full_name,
                entry.version,
                f"rank {entry.event.max_rank}",
                entry.event.summary,
            )
            for entry in found
        ]
    )
    if not found:
        terminal.talk("nothing found")
