"""Every kind of adapter that PEFT saves, packed: PEFT is the oracle of what it does.

Each is made by PEFT for a tiny random model, packed with that model's folder, read back,
loaded by PEFT from the package, and compared with a base that has other weights.
"""

import copy
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_hub
from lora_hub.base.fit import check_fit
from lora_hub.base.pipeline import open_base
from lora_hub.base.stored import stored
from lora_hub.cli.main import run
from lora_hub.errors import DocumentError, FitError, IntegrityError, LossyConversion
from lora_hub.manifest import codec
from lora_hub.package.pack import plan_package, write_package
from lora_hub.package.package import (
    Package,
    check_manifest,
    load_source,
    open_package,
)
from lora_hub.runtime.base_view import ModelBase
from lora_hub.signing import keys
from tests.builders import sign_package

TOKENS = torch.arange(12).reshape(2, 6)
FIELDS = {
    "name": "tiny-lab/verse",
    "version": "1.0.0",
    "task": "text-generation",
    "license": "MIT",
    "created": "2026-01-01T00:00:00Z",
}
SMALL = {
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def qwen(**config: Any) -> Any:
    """Return a model whose q, k and v have biases."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(**SMALL | config))


def tied() -> Any:
    return qwen(tie_word_embeddings=True)


def untied() -> Any:
    return qwen(tie_word_embeddings=False)


def classifier() -> Any:
    from transformers import Qwen2Config, Qwen2ForSequenceClassification

    return Qwen2ForSequenceClassification(Qwen2Config(**SMALL, num_labels=3))


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(vocab_size=24, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    )


def mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(
        MixtralConfig(**SMALL | {"tie_word_embeddings": False}, num_local_experts=3)
    )


class Convolutions(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.plain = torch.nn.Conv2d(2, 4, (3, 2))
        self.grouped = torch.nn.Conv2d(4, 8, 1, groups=2)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        image = input_ids.float().sin().reshape(1, 2, 3, 2)
        return self.grouped(self.plain(image))

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir()
        save_file(self.state_dict(), folder / "model.safetensors")
        (folder / "config.json").write_text("{}")


@dataclass(frozen=True)
class Kind:
    """An adapter to make, and what its manifest shall say.

    Attributes:
        base: the model that is saved, where it is not the one that was trained.
        targets: how many of the base's tensors it changes.
        check: what must hold of the manifest's `adapter`.
    """

    model: Callable[[], Any]
    lora: dict[str, Any]
    kind: str
    targets: int
    check: Callable[[Any], bool]
    base: Callable[[], Any] | None = None
    call: dict[str, Any] = field(default_factory=dict)


QV = ["q_proj", "v_proj"]
KINDS = {
    "lora": Kind(untied, {"target_modules": QV}, "lora", 2, lambda a: not a.extra_tensors),
    "dora": Kind(
        untied,
        {"target_modules": QV, "use_dora": True, "use_rslora": True},
        "dora",
        2,
        lambda a: all(m.magnitude for m in a.modules),
    ),
    "lora_bias": Kind(
        untied,
        {"target_modules": QV, "lora_bias": True},
        "lora",
        4,
        lambda a: all(m.bias for m in a.modules),
    ),
    "bias": Kind(
        untied,
        {"target_modules": QV, "bias": "all"},
        "lora+modules",
        5,
        lambda a: [one.role for one in a.extra_tensors] == ["bias"] * 3,
    ),
    "module": Kind(
        untied,
        {"target_modules": QV, "modules_to_save": ["lm_head"]},
        "lora+modules",
        3,
        lambda a: a.extra_tensors[0].name == "lm_head.weight",
    ),
    "new head": Kind(
        classifier,
        {"target_modules": QV, "task_type": "SEQ_CLS"},
        "lora+modules",
        2,
        lambda a: a.extra_tensors[0].name == "score.weight",
        base=untied,
    ),
    "tokens": Kind(
        untied,
        {"target_modules": QV, "trainable_token_indices": [3, 9]},
        "lora+tokens",
        3,
        lambda a: a.extra_tensors[0].rows == (3, 9),
    ),
    "embedding": Kind(
        untied,
        {"target_modules": ["embed_tokens", "q_proj"]},
        "lora",
        2,
        lambda a: [m.layer for m in a.modules] == ["embedding", "linear"],
    ),
    "tied head": Kind(
        tied,
        {"target_modules": ["lm_head", "q_proj"]},
        "lora",
        2,
        lambda a: a.modules[0].module == "lm_head",
    ),
    "tied weights": Kind(
        tied,
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
        "lora",
        1,
        lambda a: a.ties_weights and len(a.modules) == 1,
    ),
    "saved tied head": Kind(
        tied,
        {"target_modules": QV, "modules_to_save": ["lm_head"]},
        "lora+modules",
        3,
        lambda a: a.extra_tensors[0].shape == (24, 16),
    ),
    "conv1d": Kind(
        gpt2,
        {"target_modules": ["c_attn"], "fan_in_fan_out": True},
        "lora",
        1,
        lambda a: (a.modules[0].a, a.modules[0].b) == ((2, 16), (48, 2)),
    ),
    "conv": Kind(
        Convolutions,
        {"target_modules": ["plain", "grouped"]},
        "lora",
        2,
        lambda a: [m.layer for m in a.modules] == ["conv", "conv"],
    ),
    "experts": Kind(
        mixtral,
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        },
        "lora",
        3,
        lambda a: [m.experts for m in a.modules] == [3, 3, None],
    ),
    "alora": Kind(
        untied,
        {"target_modules": QV, "alora_invocation_tokens": [5, 6], "task_type": "CAUSAL_LM"},
        "lora",
        2,
        lambda a: a.alora_invocation_tokens == (5, 6),
    ),
}


def made(make: Callable[[], Any], seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return make().eval()


def output(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found = model(input_ids=TOKENS)
    return found if isinstance(found, torch.Tensor) else found.logits


def trained(model: Any, **lora: Any) -> Any:
    """Return a PEFT model, every number that it trains moved at random."""
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(r=2, lora_alpha=5, **lora)).eval()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return adapted


@dataclass(frozen=True)
class Made:
    package: Package
    folder: Path
    base: Path
    logits: torch.Tensor
    plan: Any


# The tiny models have no names, and PEFT has much to say about biases.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module", params=KINDS)
def one(request: Any, tmp_path_factory: Any) -> tuple[Kind, Made]:
    return KINDS[request.param], packed(
        KINDS[request.param], tmp_path_factory.mktemp("kind")
    )


def packed(kind: Kind, folder: Path) -> Made:
    made(kind.base or kind.model).save_pretrained(folder / "base")
    adapted = trained(made(kind.model), **copy.deepcopy(kind.lora))
    adapted.save_pretrained(folder / "adapter", save_embedding_layers=False)
    plan = plan_package(folder / "adapter", base=folder / "base", **FIELDS)
    package = write_package(plan, folder / "package")
    return Made(package, folder / "package", folder / "base", output(adapted), plan)


def test_the_manifest_says_what_the_adapter_is(one):
    kind, made_ = one
    manifest = made_.package.manifest

    assert manifest.kind == kind.kind
    assert kind.check(manifest.adapter)
    assert len(manifest.base.targets) == kind.targets
    weights = load_file(made_.folder / "adapter_model.safetensors")
    assert manifest.adapter.summary.parameters == sum(t.numel() for t in weights.values())
    assert codec.decode(codec.encode(manifest)) == manifest


def test_the_package_is_read_and_packing_it_again_changes_nothing(one):
    _, made_ = one

    source = load_source(open_package(made_.folder))
    again = plan_package(made_.folder, base=made_.base, **FIELDS)

    assert len(source.updates) == len(made_.package.manifest.adapter.modules)
    assert again.digest == made_.package.digest


def test_peft_loads_the_package_with_the_same_effect(one):
    from peft import PeftModel

    kind, made_ = one

    loaded = PeftModel.from_pretrained(made(kind.model), made_.folder).eval()

    assert torch.equal(output(loaded), made_.logits)


def test_validate_finds_nothing_but_the_missing_signature(one):
    _, made_ = one

    found = lora_hub.validate(made_.folder)

    assert [finding.rule for finding in found] == ["LH040"]


def test_the_running_model_is_the_base_too(one):
    kind, made_ = one
    running = made(kind.model)
    if kind.base is not None:  # its head is random and no part of the base
        running = type(running).from_pretrained(made_.base)

    fit = check_fit(made_.package.manifest.base, ModelBase(running))

    assert (fit.checked, fit.note) == (kind.targets, "")


def test_every_tensor_that_changes_is_compared_with_the_base(one, tmp_path):
    kind, made_ = one
    base = made_.package.manifest.base

    with open_base(made_.base) as view:
        assert check_fit(base, view).checked == kind.targets
    for target in base.targets:
        other = shutil.copytree(made_.base, tmp_path / target.name)
        path = other / "model.safetensors"
        tensors = load_file(path)
        with open_base(other) as view:
            names = parts(view, target.name)
        tensors[names[-1]].view(-1)[-1] += 1
        save_file(tensors, path)
        with (
            open_base(other) as view,
            pytest.raises(FitError, match="the base holds other weights") as error,
        ):
            check_fit(base, view)
        assert target.name in str(error.value)


def parts(view, name):
    place = stored(view.tensors, view.config, name)
    assert place is not None
    return place.parts


def test_a_manifest_that_says_otherwise_is_refused(one):
    _, made_ = one
    manifest = made_.package.manifest
    adapter = manifest.adapter
    wrong = [
        {"alora_invocation_tokens": (*adapter.alora_invocation_tokens, 7)},
        {"ties_weights": not adapter.ties_weights},
        {"summary": msgspec.structs.replace(adapter.summary, parameters=1)},
        {"modules": _changed(adapter.modules, magnitude=not adapter.modules[0].magnitude)},
        {"modules": _changed(adapter.modules, bias=not adapter.modules[0].bias)},
        {"modules": _changed(adapter.modules, alpha=99.0)},
    ]
    if adapter.extra_tensors:
        wrong += [
            {"extra_tensors": adapter.extra_tensors[1:]},
            {"extra_tensors": _changed(adapter.extra_tensors, dtype="F16")},
            {"extra_tensors": _changed(adapter.extra_tensors, role="embedding")},
        ]
    for changes in wrong:
        said = msgspec.structs.replace(
            manifest, adapter=msgspec.structs.replace(adapter, **changes)
        )
        package = Package(
            said,
            made_.package.manifest_bytes,
            made_.package.digest,
            made_.package.names,
            made_.package.read,
            "p",
        )
        with pytest.raises(IntegrityError):
            load_source(package)


def _changed(items, **changes):
    return (msgspec.structs.replace(items[0], **changes), *items[1:])


def test_a_new_head_is_told_in_the_plan(tmp_path):
    made_ = packed(KINDS["new head"], tmp_path)

    assert made_.plan.new == ("score.weight",)
    assert (
        "brought anew: score.weight; the base does not have score.weight\n"
        in f"{made_.plan}\n"
    )


def test_a_signed_package_with_other_tensors_verifies(tmp_path, capsys):
    made_ = packed(KINDS["tokens"], tmp_path)
    private = keys.generate()
    sign_package(made_.folder, private)
    public = keys.public_pem(keys.private_key(private, where="key"))
    (tmp_path / "key.pub").write_bytes(public)

    assert run(["verify", str(made_.folder), "--key", str(tmp_path / "key.pub")]) == 0


def test_an_adapter_of_a_resized_vocabulary_is_refused_with_the_reason(tmp_path):
    made(untied).save_pretrained(tmp_path / "base")
    model = made(untied)
    model.resize_token_embeddings(30)
    adapted = trained(model, target_modules=QV, modules_to_save=["embed_tokens"])
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)

    with pytest.raises(FitError) as error:
        plan_package(tmp_path / "adapter", base=tmp_path / "base", **FIELDS)

    assert (
        "the adapter was trained after resizing the vocabulary from 24 to 30: "
        "model.embed_tokens.weight" in str(error.value)
    )


def test_scales_are_refused_with_the_way_out(tmp_path):
    from peft import IA3Config, get_peft_model

    made(untied).save_pretrained(tmp_path / "base")
    config = IA3Config(
        task_type="CAUSAL_LM",
        target_modules=["k_proj", "down_proj"],
        feedforward_modules=["down_proj"],
    )
    adapted = get_peft_model(made(untied), config)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)

    with pytest.raises(LossyConversion) as error:
        plan_package(tmp_path / "adapter", base=tmp_path / "base", **FIELDS)

    assert "IA3" in error.value.problem
    assert "attach" in (error.value.hint or "")
    assert "merge" in (error.value.hint or "")


def test_targets_that_do_not_follow_from_the_adapter_are_refused(tmp_path):
    manifest = packed(KINDS["tokens"], tmp_path).package.manifest
    rows = next(one for one in manifest.base.targets if "embed" in one.module)
    others = tuple(one for one in manifest.base.targets if one is not rows)
    for targets, problem in (
        (others, "embed_tokens.weight is not among the base's targets"),
        ((rows, *others, _changed((rows,), tensor="x")[0]), "in the adapter modifies x"),
        ((*others, _changed((rows,), shape=(4, 16))[0]), "2 rows of"),
        ((*others, _changed((rows,), shape=(24, 8))[0]), "2 rows of"),
    ):
        base = msgspec.structs.replace(manifest.base, targets=targets)
        with pytest.raises(DocumentError, match=problem):
            check_manifest(msgspec.structs.replace(manifest, base=base), where="m")


def test_modules_that_contradict_themselves_are_refused(tmp_path):
    manifest = packed(KINDS["experts"], tmp_path).package.manifest
    modules = manifest.adapter.modules
    for changes, problem in (
        ({"experts": 2}, "experts is 2, the factors are those of 3"),
        ({"experts": None}, "experts is None, the factors are those of 3"),
        ({"rank": 4}, "are not those of factors of rank 4 for the layer experts"),
        ({"layer": "linear"}, "are not those of factors of rank 2 for the layer linear"),
        ({"b": (7, 6)}, "the factors make"),
        ({}, "listed twice"),
    ):
        wrong = _changed(modules, **changes) if changes else (modules[0], *modules)
        adapter = msgspec.structs.replace(manifest.adapter, modules=wrong)
        with pytest.raises(DocumentError, match=problem):
            check_manifest(msgspec.structs.replace(manifest, adapter=adapter), where="m")
