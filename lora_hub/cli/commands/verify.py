"""`lorahub verify`: is every byte of a package what a trusted key signed?"""

from pathlib import Path

import click

from lora_hub.cli import options, terminal


@click.command()
@click.argument("pkg", type=options.FOLDER)
@click.option(
    "--key",
    type=options.PATH,
    metavar="PUB",
    help="The public key to trust.  [default: the trust store decides]",
)
@options.as_json
def command(pkg: Path, key: Path | None, as_json: bool) -> None:
    """Check the signature of PKG and every byte it covers.

    Without --key the keys that the trust store holds for the package's namespace decide;
    see `lorahub trust`.
    """
    from lora_hub.public import packaging

    signed = packaging.verify(pkg, key)
    if as_json:
        terminal.out_json(
            {
                "package": signed.package,
                "fingerprint": signed.fingerprint,
                "files": signed.files,
            }
        )
    else:
        terminal.out(
            f"{pkg}: {len(signed.files)} files as signed with {signed.fingerprint}"
        )
        terminal.out(f"package {signed.package}")
