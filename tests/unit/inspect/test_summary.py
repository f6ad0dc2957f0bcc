import struct

import numpy as np
import pytest
from safetensors.numpy import load_file

from lora_hub.formats.detect import open_adapter
from lora_hub.inspect.summary import summarize
from lora_hub.inspect.text import render
from lora_hub.package.package import load_source, open_package
from tests.builders import tiny_adapter, tiny_package


def test_norm_from_small_matrices_is_that_of_the_dense_delta(tmp_path):
    folder = tiny_adapter(tmp_path / "adapter", rank=3, alpha=7, use_rslora=True)
    tensors = load_file(folder / "adapter_model.safetensors")

    summary = summarize(open_adapter(folder))

    total = 0.0
    for module in summary.modules:
        a, b = (
            tensors[f"base_model.model.{module.module}.lora_{which}.weight"].astype("f8")
            for which in "AB"
        )
        delta = 7 / np.sqrt(3) * b @ a
        assert module.frobenius == pytest.approx(np.linalg.norm(delta), rel=1e-12)
        assert module.shape == delta.shape
        total += np.linalg.norm(delta) ** 2
    assert summary.frobenius == pytest.approx(np.sqrt(total), rel=1e-12)


def test_norm_is_none_where_a_factor_is_not_finite(tmp_path):
    folder = tiny_adapter(tmp_path / "adapter")
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + struct.pack("<f", float("nan")))

    summary = summarize(open_adapter(folder))

    assert summary.frobenius is None
    assert [module.frobenius is None for module in summary.modules].count(True) == 1
    assert "not finite" in render(summary)


def test_text_names_package_base_and_each_kind_of_target(tmp_path):
    package = open_package(tiny_package(tmp_path / "verse", summary="tiny verse"))

    text = render(summarize(load_source(package), package.manifest))

    assert "tiny-lab/verse 1.0.0" in text
    assert "tiny verse" in text
    assert package.manifest.base.root in text
    rows = [line.split() for line in text.splitlines()[-2:]]
    assert [row[:6] for row in rows] == [
        ["q_proj", "2", "16x16", "2", "2", "F32"],
        ["v_proj", "2", "8x16", "2", "2", "F32"],
    ]


def test_text_of_a_bare_folder_says_that_the_base_was_not_identified(tmp_path):
    folder = tiny_adapter(tmp_path / "adapter", base_name=None)

    text = render(summarize(open_adapter(folder)))

    assert "not named" in text
    assert "not identified" in text
