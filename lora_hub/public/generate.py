"""Generate text with a base and adapters: what `lorahub run` does (extra `demo`)."""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_hub import extras, refs
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
        InputError: the base is no checkpoint of a causal language model that transformers
            knows, or not a whole one; the prompt is empty; or the device is not there or
            too small.
        FitError: an adapter was not made for the base.
    """
    if not 0 < repetition_penalty < math.inf:
        raise InputError(
            f"the repetition penalty is {repetition_penalty}, expected a number above 0",
            hint="1 is none",
        )
    # Nothing here asks a network: the base is a folder.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    Checkpoint.open(base).close()  # our words for a folder that is none
    torch = extras.require("torch", extra="torch")
    transformers = extras.require("transformers", extra="demo")
    from lora_hub.public.models import attach

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tokenizer = _tokenizer(transformers, base)
    inputs = tokenizer(prompt, return_tensors="pt")
    if not inputs["input_ids"].numel():
        raise InputError("the prompt is empty", hint="give the text to go on from")
    model = _model(transformers, base, getattr(torch, dtype) if dtype else "auto")
    with _on(device):
        model, inputs = model.to(device), inputs.to(device)
    host = attach(model, registry, base=base)
    weights: dict[str, float] = {}
    for what, weight in adapters:
        report = host.load(what, as_=what if refs.is_path(what) else None)
        note(str(report))
        weights[report.name] = weights.get(report.name, 0.0) + weight
    host.use(weights or None)
    with torch.inference_mode(), _on(device):
        output = model.generate(
            **inputs,
            max_new_tokens=tokens,
            do_sample=False,
            repetition_penalty=repetition_penalty,
        )
    text = tokenizer.decode(output[0], skip_special_tokens=True)
    return Generated(text, tuple(weights.items()))


@contextmanager
def _on(device: str) -> Iterator[None]:
    """Say in our words that a device is not there, or too small."""
    try:
        yield
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"the device cannot be used: {_first_line(error)}", where=device
        ) from error


def _model(transformers: Any, base: Path, dtype: Any) -> Any:
    try:
        # Code that a base brings along is never run, nor is anybody asked to allow it.
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            base,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise InputError(
            f"transformers cannot load the base: {_first_line(error)}", where=str(base)
        ) from error
    if missing := sorted(report["missing_keys"]):
        raise InputError(
            f"{len(missing)} tensors of the model are not in the checkpoint, first "
            f"{missing[0]}; transformers would make them up",
            where=str(base),
            hint="is config.json that of another model?",
        )
    return model.eval()


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _tokenizer(transformers: Any, base: Path) -> Any:
    try:
        return transformers.AutoTokenizer.from_pretrained(
            base, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(
            "the folder holds no tokenizer that can be read", where=str(base)
        ) from error
