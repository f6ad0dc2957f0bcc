"""`lorahub inspect`: what an adapter changes, target by target."""

import click

from lora_hub.cli import options, terminal


@click.command()
@click.argument("pkg")
@options.registry
@options.as_json
def command(pkg: str, registry: str | None, as_json: bool) -> None:
    """Show ranks, scalings, shapes and norms of PKG, a folder or a reference."""
    from lora_hub.inspect.summary import summarize
    from lora_hub.inspect.text import render
    from lora_hub.public.find import find

    found = find(pkg, registry)
    for note in found.notes:
        terminal.note(note)
    summary = summarize(found.source, found.manifest)
    if as_json:
        terminal.out_json(summary)
    else:
        terminal.out(render(summary))
