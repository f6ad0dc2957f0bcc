"""`lorahub sign`: writes model.sig."""

from pathlib import Path

import click

from lora_hub import settings
from lora_hub.cli import options, terminal


@click.command()
@click.argument("pkg", type=options.FOLDER)
@click.option(
    "--key",
    type=options.PATH,
    metavar="FILE",
    help="The private key.  [default: the one keygen made]",
)
@options.as_json
def command(pkg: Path, key: Path | None, as_json: bool) -> None:
    """Sign the package PKG: writes model.sig over every file of it.

    The signature is an OpenSSF Model Signing v1 bundle; `model_signing verify key` checks
    it too.
    """
    from lora_hub.public import packaging

    signed = packaging.sign(pkg, key or settings.default_key())
    if as_json:
        terminal.out_json(
            {"signature": str(pkg / "model.sig"), "fingerprint": signed.fingerprint}
        )
    else:
        terminal.out(f"signed {pkg} with {signed.fingerprint}")
