"""`lorahub convert`: an adapter in another dialect, exactly or not at all."""

from pathlib import Path
from typing import Literal

import click

from lora_hub.cli import options, terminal

# As in `formats/engines/table.py`, which is not imported for a help text; a test compares
# them.
ENGINES = ["vllm", "sglang", "llama.cpp", "lorax"]


@click.command()
@click.argument("src")
@click.option(
    "--to", required=True, type=click.Choice(options.DIALECTS), help="What to write."
)
@click.option(
    "--for",
    "engine",
    type=click.Choice(ENGINES),
    help="A serving engine, for which to say the adapter as it computes it.",
)
@click.option("--out", required=True, type=options.FOLDER, help="The folder to make.")
@click.option(
    "--from",
    "dialect",
    type=click.Choice(options.DIALECTS),
    help="What SRC is, where two dialects could be meant.",
)
@click.option(
    "--base",
    type=options.FOLDER,
    help="The folder of the base; kohya (to read), gguf and some engines need its names.",
)
@click.option(
    "--scale-from",
    type=click.Choice(["alpha", "scale"]),
    help="Which number holds where an MLX config has both.",
)
@click.option("--alpha", type=float, help="The lora_alpha of a loralib file.")
@click.option(
    "--enable-lora",
    metavar="FLAGS",
    callback=options.flags,
    help="Which parts of a merged layer a loralib file adapts, q, k and v: 1,0,1.",
)
@click.option(
    "--initial",
    type=options.FOLDER,
    help="The folder of the factors before training (PiSSA, OLoRA, CorDA).",
)
@options.registry
@options.as_json
def command(
    src: str,
    to: str,
    engine: str | None,
    out: Path,
    dialect: str | None,
    base: Path | None,
    scale_from: Literal["alpha", "scale"] | None,
    alpha: float | None,
    enable_lora: tuple[bool, ...] | None,
    initial: Path | None,
    registry: str | None,
    as_json: bool,
) -> None:
    """Write the adapter SRC in another dialect.

    SRC is a folder, one file of weights in it, or a reference. Numbers are moved and never
    changed; what a dialect cannot say is refused with the list, and nothing is written.
    For an engine that knows one scaling, factors may take up a ratio; the error is told.
    """
    from lora_hub.public import converting

    done = converting.convert(
        src,
        to,
        out,
        for_=engine,
        dialect=dialect,
        base=base,
        scale_from=scale_from,
        alpha=alpha,
        enable_lora=enable_lora,
        initial=initial,
        registry=registry,
    )
    if as_json:
        terminal.out_json(done)
        return
    terminal.out(f"read {src} as {done.dialect}: {'; '.join(done.evidence)}")
    reader = f" for {done.engine}" if done.engine else ""
    terminal.out(f"wrote {done.out} as {done.to}{reader}: {done.targets} targets")
    terminal.table(
        [(f"  {name}", terminal.size(size)) for name, size in done.files.items()]
    )
    for note in done.notes:
        terminal.note(note)
