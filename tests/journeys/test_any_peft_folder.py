"""A folder as `save_pretrained` leaves it, of any kind: checked, mended, packed, loaded."""

import json

import pytest
import torch

from lora_hub.cli.main import run
from tests import peft_zoo

KINDS = ["plain", "dora", "head", "rows", "rows of tied", "experts", "embedding"]


@pytest.mark.parametrize("kind", KINDS)
def test_untouched_output_of_peft_becomes_a_package_that_peft_loads(kind, tmp_path, capsys):
    case = peft_zoo.CASES[kind]
    theirs = peft_zoo.save(case, tmp_path / "adapter")
    peft_zoo.model(case).save_pretrained(tmp_path / "base")
    src, base, out = (str(tmp_path / name) for name in ("adapter", "base", "package"))
    said = ["--name", "me/prose", "--version", "1.0.0", "--license", "MIT"]
    places = ["--task", "text-generation", "--base", base, "--out", out]

    before = run(["validate", src, "--format", "json"])
    found = json.loads(capsys.readouterr().out)["findings"]
    fixed = run(["validate", src, "--fix"])
    packed = run(["pack", src, *said, *places])
    capsys.readouterr()
    after = run(["validate", out, "--format", "json"])
    left = json.loads(capsys.readouterr().out)["findings"]

    assert (before, fixed, packed, after) == (0, 0, 0, 0)
    assert ("LH024", "the adapter names no base") in told(found)
    assert told(left) == [("LH040", "there is no model.sig")]
    again = peft_zoo.loaded(case, tmp_path / "package")
    assert torch.equal(peft_zoo.answer(again), peft_zoo.answer(theirs))


def told(findings):
    return [(one["rule"], one["message"]) for one in findings]
