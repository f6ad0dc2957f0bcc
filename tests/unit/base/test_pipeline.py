"""A pipeline's folder as one base: names with their component, and an adapter packed."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_hub.base.fit import check_fit
from lora_hub.base.folder import FolderBase
from lora_hub.base.pipeline import PipelineBase, open_base
from lora_hub.base.view import root_of
from lora_hub.errors import DocumentError, FitError, InputError
from lora_hub.package.pack import plan_package, write_package
from lora_hub.package.package import load_source

UNET = {
    "mid_block.attentions.0.to_q.weight": (6, 4),
    "mid_block.resnets.0.conv1.weight": (4, 4, 3, 3),
}
TEXT = {"text_model.encoder.layers.0.self_attn.q_proj.weight": (4, 4)}
FIELDS = {
    "name": "tiny-lab/style",
    "version": "1.0.0",
    "task": "text-to-image",
    "license": "MIT",
    "created": "2026-01-01T00:00:00Z",
}


@pytest.fixture
def pipeline(tmp_path):
    folder = tmp_path / "pipeline"
    torch.manual_seed(0)
    for component, stem, tensors in (
        ("unet", "diffusion_pytorch_model", UNET),
        ("text_encoder", "model", TEXT),
    ):
        (folder / component).mkdir(parents=True)
        save_file(
            {name: torch.randn(shape) for name, shape in tensors.items()},
            folder / component / f"{stem}.safetensors",
        )
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    (folder / "model_index.json").write_text(
        json.dumps(
            {
                "_class_name": "StableDiffusionPipeline",
                "unet": ["diffusers", "UNet2DConditionModel"],
                "text_encoder": ["transformers", "CLIPTextModel"],
                "scheduler": ["diffusers", "PNDMScheduler"],
                "../outside": ["diffusers", "UNet2DConditionModel"],
            }
        )
    )
    return folder


def adapter(folder):
    """Write what diffusers saves: an update of each kind, in both components."""
    folder.mkdir()
    factors = {
        "unet.mid_block.attentions.0.to_q": ((2, 4), (6, 2)),
        "unet.mid_block.resnets.0.conv1": ((2, 4, 3, 3), (4, 2, 1, 1)),
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": ((2, 4), (4, 2)),
    }
    save_file(
        {
            f"base_model.model.{target}.lora_{which}.weight": torch.randn(shape)
            for target, (a, b) in factors.items()
            for which, shape in (("A", a), ("B", b))
        },
        folder / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    config["target_modules"] = [target.rpartition(".")[2] for target in factors]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_names_begin_with_the_component_and_digests_are_the_components(pipeline):
    with open_base(pipeline) as view, FolderBase.open(pipeline / "text_encoder") as part:
        (name,) = TEXT
        assert isinstance(view, PipelineBase)
        assert set(view.tensors) == {
            *(f"unet.{name}" for name in UNET),
            *(f"text_encoder.{name}" for name in TEXT),
        }
        assert view.config.architectures == ("StableDiffusionPipeline",)
        assert view.digest(f"text_encoder.{name}") == part.digest(name)
        assert view.size_bytes == 4 * (24 + 144 + 16)
        assert root_of(view) not in (None, root_of(part))


def test_an_adapter_of_a_pipeline_is_packed_and_told_from_another(pipeline, tmp_path):
    package = write_package(
        plan_package(adapter(tmp_path / "adapter"), base=pipeline, **FIELDS),
        tmp_path / "package",
    )
    base = package.manifest.base
    other = shutil.copytree(pipeline, tmp_path / "other")
    path = other / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path)

    assert len(load_source(package).updates) == len(base.targets) == 3
    with open_base(pipeline) as view:
        assert check_fit(base, view).checked == 3
    with open_base(other) as view, pytest.raises(FitError, match="2 of 3 targeted tensors"):
        check_fit(base, view)


@pytest.mark.parametrize(
    ("spoil", "error", "problem"),
    [
        (
            lambda folder: (folder / "model_index.json").write_text("[]"),
            DocumentError,
            "the document is a list",
        ),
        (
            lambda folder: (folder / "model_index.json").write_text("{}"),
            InputError,
            "no component of model_index.json holds weights",
        ),
        (
            lambda folder: (folder / "unet" / "diffusion_pytorch_model.safetensors").rename(
                folder / "unet" / "diffusion_pytorch_model.bin"
            ),
            InputError,
            "holds weights only as a pickle",
        ),
    ],
)
def test_a_broken_pipeline_is_refused(pipeline, spoil, error, problem):
    spoil(pipeline)

    with pytest.raises(error, match=problem):
        open_base(pipeline)
