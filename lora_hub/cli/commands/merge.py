"""`lorahub merge`: base + adapters → checkpoint."""

from pathlib import Path

import click

from lora_hub.cli import options, terminal


@click.command()
@click.argument("refs", nargs=-1, required=True, metavar="REF[=W]…")
@options.base
@click.option(
    "--out",
    type=options.FOLDER,
    help="The checkpoint folder to make; needed unless --plan is given.",
)
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32", "float64"]),
    help="Store floating-point tensors so.  [default: as the base has them]",
)
@click.option(
    "--untie",
    is_flag=True,
    help="Give a head that shares its tensor with the embedding one of its own.",
)
@click.option(
    "--plan", "plan_only", is_flag=True, help="Print what would be done; write nothing."
)
@options.registry
@options.as_json
def command(
    refs: tuple[str, ...],
    base: Path,
    out: Path | None,
    dtype: str | None,
    untie: bool,
    plan_only: bool,
    registry: str | None,
    as_json: bool,
) -> None:
    """Merge adapters into the weights of a base, as a checkpoint folder.

    Tensors are streamed one block of rows at a time. All adapters are summed before
    anything is rounded, and each weight is rounded once. What is not touched keeps its
    bytes. The folder appears when it is whole.
    """
    from lora_hub import refs as grammar
    from lora_hub.public import models

    parts = [grammar.parse_weighted(text) for text in refs]
    if plan_only:
        plan = models.merge_plan(
            base,
            parts,
            dtype=dtype,
            untie=untie,
            registry=registry,
            note=terminal.note,
        )
        terminal.out_json(plan) if as_json else terminal.out(str(plan))
        return
    if out is None:
        raise click.UsageError("Missing option '--out': the folder to make.")
    with terminal.progress("merging") as step:
        report = models.merge(
            base,
            parts,
            out,
            dtype=dtype,
            untie=untie,
            registry=registry,
            note=terminal.note,
            progress=step,
        )
    terminal.out_json(report) if as_json else terminal.out(str(report))
