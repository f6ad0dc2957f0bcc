"""`lorahub run`: try a base with adapters."""

from pathlib import Path

import click

from lora_hub.cli import options, terminal


@click.command()
@click.argument("prompt")
@options.base
@click.option(
    "--adapter", "adapters", multiple=True, metavar="REF[=W]", help="May be repeated."
)
@click.option(
    "--tokens",
    type=click.IntRange(min=1),
    default=60,
    show_default=True,
    help="How many new tokens at most.",
)
@click.option(
    "--repetition-penalty",
    default=1.2,
    show_default=True,
    help="Above 1: what was said becomes less likely.",
)
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    help="Hold the base so.  [default: as the checkpoint has it]",
)
@click.option("--device", default="cpu", show_default=True, help="Such as cuda.")
@options.registry
@options.as_json
def command(
    prompt: str,
    base: Path,
    adapters: tuple[str, ...],
    tokens: int,
    repetition_penalty: float,
    dtype: str | None,
    device: str,
    registry: str | None,
    as_json: bool,
) -> None:
    r"""Generate text: greedy decoding of PROMPT with a base and adapters.

    \b
    lorahub run --base build/base --adapter style/milton "ROMEO."
    """
    from lora_hub import refs as grammar
    from lora_hub.public import generate

    parts = [grammar.parse_weighted(text) for text in adapters]
    result = generate.generate(
        prompt,
        base=base,
        adapters=parts,
        registry=registry,
        tokens=tokens,
        repetition_penalty=repetition_penalty,
        dtype=dtype,
        device=device,
        note=terminal.note,
    )
    if as_json:
        terminal.out_json(result)
    else:
        terminal.out(result.text)
