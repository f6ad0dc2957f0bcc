"""`lorahub compose`: adapters → one adapter."""

from pathlib import Path

import click

from lora_hub.cli import options, terminal


@click.command()
@click.argument("refs", nargs=-1, required=True, metavar="REF=W…")
@click.option(
    "--method", default="linear", show_default=True, help="linear or cat; both are exact."
)
@click.option(
    "--out", required=True, type=options.FOLDER, help="The adapter folder to make."
)
@options.registry
@options.as_json
def command(
    refs: tuple[str, ...], method: str, out: Path, registry: str | None, as_json: bool
) -> None:
    """Combine adapters into one: the sum of their deltas, each times its weight.

    REF is a name or a folder, W its weight (1.0 when left out), for example
    `style/shakespeare=0.6 style/milton=0.4`. The result is an adapter folder that PEFT
    loads and `lorahub pack` takes.
    """
    from lora_hub import refs as grammar
    from lora_hub.public import models

    parts = [grammar.parse_weighted(text) for text in refs]
    adapter = models.compose(parts, method=method, registry=registry, note=terminal.note)
    models.save(adapter, out)
    ranks = sorted({update.rank for update in adapter.updates.values()})
    if as_json:
        terminal.out_json(
            {"out": str(out), "targets": len(adapter.updates), "ranks": ranks}
        )
    else:
        terminal.out(f"wrote {out}: {len(adapter.updates)} targets, ranks {ranks}")
