"""`lorahub push`: publish a package."""

from pathlib import Path

import click

from lora_hub.cli import options, terminal


@click.command()
@click.argument("pkg", type=options.FOLDER)
@options.registry
@click.option(
    "--key",
    type=options.PATH,
    metavar="PUB",
    help="The public key, when the namespace is new.  [default: the one keygen made]",
)
@options.as_json
def command(pkg: Path, registry: str | None, key: Path | None, as_json: bool) -> None:
    """Publish the signed package PKG.

    The first push into a namespace claims it for the signer's key. A published version
    never changes: pushing the same bytes again is fine, other bytes are refused.
    """
    from lora_hub.public import publishing

    result = publishing.push(pkg, registry, key)
    if as_json:
        terminal.out_json(result)
        return
    said = "is published already" if result.already else "is published"
    terminal.out(f"{result.name} {result.version} {said}: {result.package}")
