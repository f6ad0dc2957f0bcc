"""`lorahub yank`: withdraw a version."""

from pathlib import Path

import click

from lora_hub import settings
from lora_hub.cli import options, terminal


@click.command()
@click.argument("ref")
@click.option("--reason", metavar="WHY", help="What users are told; needed unless --undo.")
@click.option("--undo", is_flag=True, help="Bring the version back.")
@click.option(
    "--key",
    type=options.PATH,
    metavar="FILE",
    help="A private key of the namespace.  [default: the one keygen made]",
)
@options.registry
@options.as_json
def command(
    ref: str,
    reason: str | None,
    undo: bool,
    key: Path | None,
    registry: str | None,
    as_json: bool,
) -> None:
    """Withdraw the version REF names, such as me/sql@1.0.0.

    Ranges and latest pass over it; who names it exactly still gets it, and is told why it
    was withdrawn. Nothing is deleted.
    """
    from lora_hub.public import publishing

    key = key or settings.default_key()
    if undo:
        changed = publishing.unyank(ref, key, registry=registry)
    elif reason is None:
        raise click.UsageError("Missing option '--reason': what users are told.")
    else:
        changed = publishing.yank(ref, reason, key, registry=registry)
    done = "is available again" if undo else "is withdrawn"
    if as_json:
        terminal.out_json({"ref": ref, "yanked": not undo, "changed": changed})
    else:
        terminal.out(f"{ref} {done}" if changed else f"{ref} {done}; it was so already")
