"""`lorahub keygen`: a P-256 key pair."""

from pathlib import Path

import click

from lora_hub import settings
from lora_hub.cli import options, terminal


@click.command()
@click.option(
    "--out",
    type=options.PATH,
    help="Where the private key goes.  [default: in LORAHUB_HOME]",
)
@options.as_json
def command(out: Path | None, as_json: bool) -> None:
    """Make a key pair for signing: FILE (private, mode 0600) and FILE.pub.

    An existing file is never overwritten.
    """
    from lora_hub.public import keys

    pair = keys.keygen(out or settings.default_key())
    if as_json:
        terminal.out_json(
            {
                "private": str(pair.private),
                "public": str(pair.public),
                "fingerprint": pair.fingerprint,
            }
        )
        return
    terminal.out(f"private key  {pair.private}  (keep it secret)")
    terminal.out(f"public key   {pair.public}")
    terminal.out(f"fingerprint  {pair.fingerprint}")
