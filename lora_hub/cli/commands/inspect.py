"""`lorahub inspect`: what an adapter changes, target by target."""

from collections.abc import Mapping
from typing import Any

import click

from lora_hub.cli import options, terminal


@click.command()
@click.argument("pkg")
@options.reading()
@options.registry
@options.as_json
def command(pkg: str, how: Mapping[str, Any], registry: str | None, as_json: bool) -> None:
    """Show ranks, scalings, shapes and norms of PKG, a folder or a reference."""
    from lora_hub.formats.dialect import ReadOptions
    from lora_hub.inspect.summary import summarize
    from lora_hub.inspect.text import render
    from lora_hub.public.find import find

    said = {name: value for name, value in how.items() if name != "from_"}
    found = find(pkg, registry, options=ReadOptions(**said), dialect=how.get("from_"))
    for note in found.notes:
        terminal.note(note)
    summary = summarize(found.source, found.manifest)
    if as_json:
        terminal.out_json(summary)
    else:
        terminal.out(render(summary))
