"""Generate text with a base and adapters: what `lorahub run` does (extra `demo`)."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_hub import extras
from lora_hub.errors import InputError
from lora_hub.tensors.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True)
class Generated:
    """A prompt with its continuation, and what was used for it."""

    text: str
    adapters: tuple[tuple[str, float], ...]


def generate(
    prompt: str,
    *,
    base: Path,
    adapters: Sequence[tuple[str, float]],
    registry: str | None,
    tokens: int,
    repetition_penalty: float,
    dtype: str | None,
    device: str,
    note: Callable[[str], None],
) -> Generated:
    """Return greedy text of a base with adapters, see `lorahub run`.

    Raises:
        MissingExtra: torch or transformers is not installed.
        InputError: the base is no checkpoint, or the device is not there.
        FitError: an adapter was not made for the base.
    """
    # Nothing here asks a network: the base is a folder.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    Checkpoint.open(base).close()  # our words for a folder that is none
    torch = extras.require("torch", extra="torch")
    transformers = extras.require("transformers", extra="demo")
    from lora_hub.public.models import attach

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tokenizer = _tokenizer(transformers, base)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        base, dtype=getattr(torch, dtype) if dtype else "auto", local_files_only=True
    ).eval()
    try:
        model = model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"the device cannot be used: {str(error).splitlines()[0]}", where=device
        ) from error
    host = attach(model, registry)
    weights: dict[str, float] = {}
    for what, weight in adapters:
        report = host.load(what, as_=what if Path(what).is_dir() else None)
        note(str(report))
        weights[report.name] = weight
    host.use(weights or None)
    inputs = tokenizer(prompt, return_tensors="pt").to(device)
    with torch.inference_mode():
        output = model.generate(
            **inputs,
            max_new_tokens=tokens,
            do_sample=False,
            repetition_penalty=repetition_penalty,
        )
    text = tokenizer.decode(output[0], skip_special_tokens=True)
    return Generated(text, tuple(weights.items()))


def _tokenizer(transformers: Any, base: Path) -> Any:
    try:
        return transformers.AutoTokenizer.from_pretrained(base, local_files_only=True)
    except (OSError, ValueError) as error:
        raise InputError(
            "the folder holds no tokenizer that can be read", where=str(base)
        ) from error
