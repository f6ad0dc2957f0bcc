"""The whole journey on real input; `make demo` runs it.

Verify the registry, pull two adapters by name, generate with the base and with each and
both, show that four wrong bases are refused, compose, merge to a checkpoint, and show that
plain transformers writes the same text with it as the attached model does.

Usage: python examples/demo.py          (from the repository root, after `make base`)
"""

import copy
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

BASE, REGISTRY, OUT = Path("build/base"), Path("registry"), Path("build/demo")
PROMPT = "ROMEO.\nWhat light"
TOKENS = 40

# The demo is a newcomer: no keys pinned, nothing cached.
shutil.rmtree(OUT, ignore_errors=True)
os.environ |= {
    "LORAHUB_HOME": str(OUT / "home"),
    "LORAHUB_CACHE": str(OUT / "cache"),
    "LORAHUB_REGISTRY": str(REGISTRY),
    "HF_HUB_OFFLINE": "1",
}
LORAHUB = Path(sysconfig.get_path("scripts"), "lorahub")


def main() -> None:
    start = time.monotonic()
    title("The registry: every event, blob and signature")
    lorahub("registry", "check", REGISTRY)
    lorahub("validate", REGISTRY)

    title("Two adapters by name: resolved, fetched, every byte checked, signature verified")
    lorahub("pull", "style/shakespeare@~=1.0")
    lorahub("pull", "style/milton")
    lorahub("show", "style/milton")

    import torch
    import transformers

    import lora_hub

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(BASE)
    model = load(BASE)

    title("One base, four voices")
    host = lora_hub.attach(model)
    for name in ("style/shakespeare", "style/milton"):
        print(host.load(name))
    both = {"style/shakespeare": 0.5, "style/milton": 0.5}
    texts = {}
    for label, active in {
        "the base alone": None,
        "style/shakespeare": "style/shakespeare",
        "style/milton": "style/milton",
        "both, 0.5 and 0.5": both,
    }.items():
        with host.using(active):
            texts[label] = write(model, tokenizer)
        print(f"\n--- {label}\n{texts[label]}")
    expect(len(set(texts.values())) == 4, "the four texts differ")

    title("Four wrong bases, four refusals")
    messages = set()
    for label, wrong in wrong_bases(model):
        stranger = lora_hub.attach(wrong)
        try:
            stranger.load("style/milton")
        except lora_hub.LoraHubError as error:
            messages.add(error.problem)
            print(f"{label}\n    {error}\n")
            expect(
                error.exit_code == 3, "the refusal says that adapter and base do not fit"
            )
        else:
            expect(False, f"{label} is refused")
    expect(len(messages) == 4, "the four messages differ")

    title("Compose: both adapters as one, which is again an adapter")
    weights = ["style/shakespeare=0.5", "style/milton=0.5"]
    lorahub("compose", *weights, "--out", OUT / "both")
    host.load(OUT / "both", as_="both")
    with host.using("both"):
        expect(
            write(model, tokenizer) == texts["both, 0.5 and 0.5"], "composed = both in use"
        )
    host.detach()

    title("Merge: a checkpoint that needs no adapter")
    lorahub(
        "merge", *weights, "--base", BASE, "--dtype", "float32", "--out", OUT / "merged"
    )
    merged = write(load(OUT / "merged"), tokenizer)
    print(f"\n--- the merged checkpoint, in plain transformers\n{merged}")
    expect(merged == texts["both, 0.5 and 0.5"], "merged text = text of the attached model")
    expect(
        write(model, tokenizer) == texts["the base alone"],
        "the detached base writes as before",
    )
    print(f"\nThe demo took {time.monotonic() - start:.0f} s.")


def wrong_bases(model):
    """Give four models that the adapters were not made for."""
    import torch
    import transformers

    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    yield "other weights of the same shapes", other

    config = copy.deepcopy(model.config)
    config.num_hidden_layers = 20
    config.layer_types = None
    fewer = transformers.LlamaForCausalLM(config)
    fewer.load_state_dict(model.state_dict(), strict=False)
    yield "the same model with fewer layers", fewer

    yield "the same model in another dtype", copy.deepcopy(model).half()

    yield (
        "another architecture",
        transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_layer=2, n_embd=64, n_head=2, vocab_size=50257)
        ),
    )


def load(folder):
    import torch
    from transformers import AutoModelForCausalLM

    # float32 holds the bfloat16 base exactly, so greedy texts can be compared.
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def write(model, tokenizer) -> str:
    import torch

    inputs = tokenizer(PROMPT, return_tensors="pt")
    with torch.inference_mode():
        tokens = model.generate(
            **inputs, max_new_tokens=TOKENS, do_sample=False, repetition_penalty=1.2
        )
    return tokenizer.decode(tokens[0], skip_special_tokens=True)


def lorahub(*arguments) -> None:
    words = [str(argument) for argument in arguments]
    print(f"$ lorahub {' '.join(words)}", flush=True)
    subprocess.run([LORAHUB, *words], check=True)


def title(text: str) -> None:
    print(f"\n=== {text}\n", flush=True)


def expect(claim: bool, words: str) -> None:
    if not claim:
        sys.exit(f"the demo failed: expected that {words}")
    print(f"[ok] {words}")


if __name__ == "__main__":
    main()
