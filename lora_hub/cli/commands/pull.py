"""`lorahub pull`: get a package by name, checked."""

from pathlib import Path

import click

from lora_hub.cli import options, terminal


@click.command()
@click.argument("ref")
@options.registry
@click.option(
    "--out",
    type=options.FOLDER,
    help="Copy the package there.  [default: it stays in the cache]",
)
@options.as_json
def command(ref: str, registry: str | None, out: Path | None, as_json: bool) -> None:
    """Get the package that REF names: every byte checked, the signature verified."""
    from lora_hub.public import publishing

    pulled = publishing.pull(ref, registry, out)
    for note in pulled.notes:
        terminal.note(note)
    if as_json:
        terminal.out_json(pulled)
        return
    terminal.out(f"{pulled.name} {pulled.version}  {pulled.package}")
    terminal.out(f"signed with {pulled.fingerprint}")
    terminal.out(str(pulled.folder))
