"""`lorahub convert`: an adapter in another dialect, exactly or not at all."""

from pathlib import Path
from typing import Literal

import click

from lora_hub.cli import options, terminal

# As in `formats/detect.py`, which is not imported for a help text; a test compares them.
DIALECTS = ["peft", "mlx", "kohya", "diffusers", "loralib", "gguf"]


@click.command()
@click.argument("src")
@click.option("--to", required=True, type=click.Choice(DIALECTS), help="What to write.")
@click.option("--out", required=True, type=options.FOLDER, help="The folder to make.")
@click.option(
    "--from",
    "dialect",
    type=click.Choice(DIALECTS),
    help="What SRC is, where two dialects could be meant.",
)
@click.option(
    "--base",
    type=options.FOLDER,
    help="The folder of the base; kohya (to read) and gguf need its names.",
)
@click.option(
    "--scale-from",
    type=click.Choice(["alpha", "scale"]),
    help="Which number holds where an MLX config has both.",
)
@click.option("--alpha", type=float, help="The lora_alpha of a loralib file.")
@options.registry
@options.as_json
def command(
    src: str,
    to: str,
    out: Path,
    dialect: str | None,
    base: Path | None,
    scale_from: Literal["alpha", "scale"] | None,
    alpha: float | None,
    registry: str | None,
    as_json: bool,
) -> None:
    """Write the adapter SRC in another dialect.

    SRC is a folder, one file of weights in it, or a reference. Numbers are moved and never
    changed; what a dialect cannot say is refused with the list, and nothing is written.
    """
    from lora_hub.public import converting

    done = converting.convert(
        src,
        to,
        out,
        dialect=dialect,
        base=base,
        scale_from=scale_from,
        alpha=alpha,
        registry=registry,
    )
    if as_json:
        terminal.out_json(done)
        return
    terminal.out(f"read {src} as {done.dialect}: {'; '.join(done.evidence)}")
    terminal.out(f"wrote {done.out} as {done.to}: {done.targets} targets")
    terminal.table(
        [(f"  {name}", terminal.size(size)) for name, size in done.files.items()]
    )
    for note in done.notes:
        terminal.note(note)
