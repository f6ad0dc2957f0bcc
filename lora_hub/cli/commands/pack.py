"""`lorahub pack`: an adapter folder and its base → a package."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from lora_hub.cli import options, terminal


@click.command()
@click.argument("src", type=options.FOLDER)
@click.option(
    "--name", required=True, metavar="NS/NAME", help="What the package is called."
)
@click.option("--version", required=True, metavar="V", help="Its version, such as 1.0.0.")
@options.base
@click.option(
    "--task", required=True, metavar="TASK", help="Such as text-generation/verse."
)
@click.option(
    "--license", "license_", required=True, metavar="SPDX", help="Such as Apache-2.0."
)
@click.option(
    "--out",
    type=options.FOLDER,
    help="The folder to make; needed unless --dry-run is given.",
)
@click.option("--summary", default="", metavar="TEXT", help="One line: what it does.")
@click.option("--author", "authors", multiple=True, metavar="NAME", help="May be repeated.")
@click.option(
    "--language",
    "languages",
    multiple=True,
    metavar="CODE",
    help="ISO 639, may be repeated.",
)
@click.option(
    "--base-hint",
    "hints",
    multiple=True,
    metavar="HUB:NAME[@REV]",
    help="Where the base is found, such as hf:org/name@commit. May be repeated.",
)
@click.option("--base-license", metavar="SPDX", help="The licence of the base.")
@click.option(
    "--extra",
    type=options.PATH,
    metavar="FILE",
    help="A JSON object of further fields: training, evaluation, lineage, runtime, …",
)
@options.reading(with_base=False)
@click.option("--dry-run", is_flag=True, help="Say what would be packed; write nothing.")
@options.as_json
def command(
    src: Path,
    name: str,
    version: str,
    base: Path,
    task: str,
    license_: str,
    out: Path | None,
    summary: str,
    authors: tuple[str, ...],
    languages: tuple[str, ...],
    hints: tuple[str, ...],
    base_license: str | None,
    extra: Path | None,
    how: Mapping[str, Any],
    dry_run: bool,
    as_json: bool,
) -> None:
    """Make a package from the adapter folder SRC, in any dialect that is read.

    Every tensor is accounted for, the base is identified by its contents, and the same
    input gives the same bytes. SOURCE_DATE_EPOCH fixes the time of creation.
    """
    if out is None and not dry_run:
        raise click.UsageError("Missing option '--out': the folder to make.")
    from lora_hub import strict_json
    from lora_hub.package.pack import write_package
    from lora_hub.public import packaging

    plan = packaging.plan(
        src,
        name=name,
        version=version,
        base=base,
        task=task,
        license=license_,
        summary=summary,
        authors=authors,
        languages=languages,
        hints=hints,
        base_license=base_license,
        extra=strict_json.read_object(extra) if extra else None,
        **how,
    )
    if out is not None and not dry_run:
        write_package(plan, out)
    if as_json:
        terminal.out_json({"package": plan.digest, "manifest": plan.manifest})
    else:
        terminal.out(str(plan))
    terminal.talk("nothing was written (--dry-run)" if dry_run else f"wrote {out}")
