"""`lorahub fingerprint`: the identity of a base."""

from pathlib import Path

import click

from lora_hub.cli import options, terminal


@click.command()
@click.argument("base", type=options.FOLDER)
@click.option("--tensors", is_flag=True, help="Print the digest of every tensor too.")
@options.as_json
def command(base: Path, tensors: bool, as_json: bool) -> None:
    """Say which base a checkpoint folder holds.

    The root covers every tensor's name, dtype, shape and bytes, and does not depend on
    sharding, order or file names. The structure covers names and shapes alone and is read
    from the headers.
    """
    from lora_hub.public import packaging

    found = packaging.fingerprint(base, tensors=tensors)
    if as_json:
        terminal.out_json(found)
        return
    terminal.out(f"root       {found.root}")
    terminal.out(f"structure  {found.struct}")
    terminal.out(f"tensors    {found.count}, {terminal.size(found.size_bytes)}")
    terminal.table([(name, sha256) for name, sha256 in found.tensors.items()])
