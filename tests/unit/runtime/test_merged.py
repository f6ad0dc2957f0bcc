"""Merging on a live model, against dense float64 sums of what PEFT saved."""

import copy
import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora_hub.adapter.adapter import Adapter, Replaced
from lora_hub.adapter.load import load
from lora_hub.adapter.update import Update
from lora_hub.errors import (
    ComposeError,
    FitError,
    InputError,
    IntegrityError,
    NotFoundError,
)
from lora_hub.formats.detect import open_adapter
from lora_hub.runtime import written
from lora_hub.runtime.changed import Acting
from lora_hub.runtime.merged import merge
from lora_hub.runtime.prepare import prepare
from tests import peft_zoo as zoo
from tests.builders import tiny_adapter, tiny_base, tiny_model
from tests.dense import put_in

Q0 = "model.layers.0.self_attn.q_proj"


def ready(model, *folders_or_adapters, weights=None):
    """Return what `merge` takes, with one weight for each."""
    acting = []
    for index, what in enumerate(folders_or_adapters):
        adapter = what if isinstance(what, Adapter) else load(open_adapter(what))
        weight = 1.0 if weights is None else weights[index]
        acting.append((f"adapter{index}", prepare(model, adapter, where="it"), weight))
    return acting


def numbers(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def digests(model):
    return {
        name: hashlib.sha256(
            tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        ).hexdigest()
        for name, tensor in model.state_dict().items()
    }


def change(*shape, scale=1.0, seed=0, **more):
    """Return an update of rank 2 for a layer of this shape."""
    generator = torch.Generator().manual_seed(seed)
    out, inp = shape
    return Update(
        a=torch.randn(2, inp, generator=generator),
        b=torch.randn(out, 2, generator=generator),
        scaling=torch.full((2,), scale, dtype=torch.float64),
        **more,
    )


def two_adapters(folder, model=None):
    return [
        tiny_adapter(folder / "one", rank=2, seed=1, model=copy.deepcopy(model)),
        tiny_adapter(
            folder / "two",
            rank=3,
            use_rslora=True,
            targets=("v_proj", "down_proj"),
            seed=2,
            model=copy.deepcopy(model),
        ),
    ]


# Where PEFT's own formula is not the attached model's: it changes what is tied twice, or
# both uses though one was trained; and a convolution in groups is no longer one.
NOT_DENSE = {
    "embedding alone",
    "rows of an output",
    "rows of tied, unlike",
    "rows beside a head",
    "tied output",
    "tied update",
    "alora",
}


CELLS = [
    (name, dtype)
    for name in sorted(zoo.CASES.keys() - NOT_DENSE)
    for dtype in (torch.float32, torch.bfloat16)
]


@pytest.mark.parametrize(("name", "dtype"), [*CELLS, ("dora", torch.float64)])
def test_every_semantics_is_merged_within_twice_plain_torchs_error(name, dtype, tmp_path):
    case = zoo.CASES[name]
    zoo.save(case, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    model = zoo.model(case).to(dtype)
    truth = put_in(zoo.model(case).to(dtype).double(), tmp_path, config).state_dict()
    plain = put_in(zoo.model(case).to(dtype), tmp_path, config).state_dict()
    before = digests(model)

    merged = merge(model, ready(model, tmp_path))

    after = numbers(model)
    grouped = {"grouped.weight"} if merged.left else set()
    for each, tensor in after.items():
        if each in grouped:
            continue
        error = (tensor.double() - truth[each]).norm()
        theirs = (plain[each].double() - truth[each]).norm()
        assert error <= 2 * theirs + 1e-14 * truth[each].norm(), each
    assert digests(model) != before

    merged.unmerge()

    assert digests(model) == before


def test_several_adapters_are_one_sum_and_one_rounding(tmp_path):
    model = tiny_model(dtype="bfloat16")
    before = numbers(model)
    folders = two_adapters(tmp_path)
    weights = (0.7, -1.3)
    exact = {name: tensor.double() for name, tensor in before.items()}
    for folder, weight in zip(folders, weights, strict=True):
        config = json.loads((folder / "adapter_config.json").read_text())
        alone = tiny_model(dtype="bfloat16").double()
        for name, tensor in put_in(alone, folder, config).state_dict().items():
            exact[name] += weight * (tensor - before[name].double())

    merge(model, ready(model, *folders, weights=weights))

    for name, tensor in model.state_dict().items():
        was = before[name].float()
        delta = (exact[name] - before[name].double()).float()
        assert torch.equal(tensor, (was + delta).bfloat16()), name


def test_an_adapter_and_its_negation_leave_every_bit(tmp_path):
    model = tiny_model(dtype="bfloat16")
    before = digests(model)
    folder = tiny_adapter(tmp_path)

    merge(model, ready(model, folder, folder, weights=(0.3, -0.3)))

    assert digests(model) == before


def test_addresses_and_parameters_stay(tmp_path):
    model = tiny_model()
    model.requires_grad_(True)
    before = {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}

    merged = merge(model, ready(model, tiny_adapter(tmp_path)))

    assert {n: (id(p), p.data_ptr()) for n, p in model.named_parameters()} == before
    assert all(p.requires_grad and p.grad_fn is None for p in model.parameters())
    merged.unmerge()
    assert {n: (id(p), p.data_ptr()) for n, p in model.named_parameters()} == before


def test_a_bias_for_a_layer_without_one_is_left_to_act():
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2))
    bias = torch.arange(4.0).double()
    adapter = Adapter(
        {"0": change(4, 3, bias=bias), "1": change(2, 4, bias=torch.ones(2).double())}
    )
    was = model[1].bias.detach().clone()

    merged = merge(model, ready(model, adapter, weights=(0.5,)))

    ((name, prepared, weight, _),) = merged.left
    (rest,) = prepared.updates.values()
    assert (name, weight, list(prepared.updates)) == ("adapter0", 0.5, ["0"])
    assert torch.equal(rest.update.bias, bias)
    assert rest.update.rank == 0
    assert torch.equal(model[1].bias, was + 0.5)
    assert any("0 of adapter0 (a bias)" in note for note in merged.report.notes)


def test_a_convolution_in_groups_is_left_to_act_and_its_bias_is_merged(tmp_path):
    case = zoo.CASES["convolutions with biases"]
    zoo.save(case, tmp_path)
    model = zoo.model(case)
    weight, bias = (each.detach().clone() for each in model.grouped.parameters())

    merged = merge(model, ready(model, tmp_path))

    (left,) = merged.left
    update = left.prepared.updates["grouped"].update
    assert torch.equal(model.grouped.weight, weight)
    assert not torch.equal(model.grouped.bias, bias)
    assert (update.bias, update.rank > 0) == (None, True)


UNLIKE = [
    "embedding alone",
    "rows of an output",
    "rows of tied, unlike",
    "rows beside a head",
]


@pytest.mark.parametrize("name", UNLIKE)
def test_a_tied_pair_is_not_changed_for_both_unless_it_is_untied(name, tmp_path):
    """I-16: merging into the embedding does not change the head, or each is told apart."""
    case = zoo.CASES[name]
    zoo.save(case, tmp_path)
    model = zoo.model(case)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    own = embedding.weight
    before = digests(model)

    with pytest.raises(FitError, match="are one tensor") as refused:
        merge(model, ready(model, tmp_path))

    assert "untie=True" in refused.value.hint
    assert digests(model) == before
    merged = merge(model, ready(model, tmp_path), untie=True)
    assert not torch.equal(embedding.weight, head.weight)
    assert any("no longer one tensor" in note for note in merged.report.notes)
    merged.unmerge()
    assert embedding.weight is own
    assert head.weight is own
    assert digests(model) == before


def test_the_unchanged_use_of_a_pair_keeps_the_tensor(tmp_path):
    case = zoo.CASES["rows of an output"]  # changes the head alone
    zoo.save(case, tmp_path)
    model = zoo.model(case)
    own = model.model.embed_tokens.weight
    before = own.detach().clone()

    merge(model, ready(model, tmp_path), untie=True)

    assert model.model.embed_tokens.weight is own
    assert torch.equal(own, before)
    assert model.lm_head.weight.requires_grad == own.requires_grad
    assert [*dict(model.named_parameters())].count("lm_head.weight") == 1


def test_two_parameters_of_one_memory_are_a_pair(tmp_path):
    model = tiny_model()
    model.lm_head.weight = nn.Parameter(model.model.embed_tokens.weight.data)
    adapter = tiny_adapter(tmp_path, targets=("embed_tokens", "q_proj"))

    with pytest.raises(FitError, match="are one tensor"):
        merge(model, ready(model, adapter))


def test_a_weight_that_lies_over_another_is_refused():
    memory = torch.randn(20)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(3, 4))
    model[0].weight = nn.Parameter(memory[:12].view(4, 3))
    model[1].weight = nn.Parameter(memory[8:].view(4, 3))

    with pytest.raises(FitError, match="shares its memory"):
        merge(model, ready(model, Adapter({"0": change(4, 3)})))


def test_weights_side_by_side_in_one_memory_are_merged_one_by_one():
    memory = torch.randn(24)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(3, 4))
    model[0].weight = nn.Parameter(memory[:12].view(4, 3))
    model[1].weight = nn.Parameter(memory[12:].view(4, 3))
    other = memory[12:].clone()

    merge(model, ready(model, Adapter({"0": change(4, 3)})))

    assert torch.equal(model[1].weight.view(-1), other)


class Odd(torch.Tensor):
    """Stands for the many tensors that hold their numbers in their own way."""


def odd(layer):
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Odd))


def computed(layer):
    nn.utils.parametrizations.weight_norm(layer)


def eight_bits(layer):
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn))


def meta(layer):
    layer.to("meta")


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (odd, "held as a Odd"),
        (computed, "computed by the layer"),
        (eight_bits, "held as torch.float8_e4m3fn"),
        (meta, "not in memory"),
    ],
)
def test_weights_that_cannot_be_summed_are_refused_before_any_is_touched(spoil, problem):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    spoil(model[1])
    before = digests(model[0])

    with pytest.raises(FitError, match=problem) as refused:
        merge(model, ready(model, Adapter({"0": change(4, 3), "1": change(2, 4)})))

    assert refused.value.where == "1.weight"
    assert digests(model[0]) == before


def test_an_alora_is_refused(tmp_path):
    model = tiny_model()
    ((name, prepared, weight),) = ready(model, tiny_adapter(tmp_path))

    with pytest.raises(ComposeError, match="invocation tokens"):
        merge(model, [Acting(name, prepared, weight, (7, 8))])


def test_numbers_that_do_not_fit_are_refused_and_all_is_put_back():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).half()
    before = digests(model)
    adapter = Adapter({"0": change(4, 3), "1": change(2, 4, scale=1e6)})

    with pytest.raises(ComposeError, match="not finite in") as refused:
        merge(model, ready(model, adapter))

    assert refused.value.where == "1.weight"
    assert digests(model) == before


def test_a_base_that_is_not_finite_is_no_fault_of_the_adapter():
    model = nn.Sequential(nn.Linear(3, 4))
    with torch.no_grad():
        model[0].weight[1, 2] = float("nan")
    before = digests(model)

    merged = merge(model, ready(model, Adapter({"0": change(4, 3)})))

    assert digests(model) != before
    merged.unmerge()
    assert digests(model) == before


def test_an_interrupt_in_the_middle_puts_everything_back(tmp_path):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    before = digests(model)
    acting = ready(model, Adapter({"0": change(4, 3), "1": change(2, 4)}))
    aimed = acting[0][1].updates["1"]
    object.__setattr__(aimed.update, "a", Breaking(aimed.update.a))

    with pytest.raises(KeyboardInterrupt):
        merge(model, acting)

    assert digests(model) == before


class Breaking(torch.Tensor):
    """A factor that interrupts whoever computes with it."""

    @staticmethod
    def __new__(cls, tensor):
        return tensor.as_subclass(cls)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.Tensor.double:
            raise KeyboardInterrupt
        return super().__torch_function__(function, types, args, kwargs or {})


def test_tensors_made_in_inference_mode_are_merged_and_come_back():
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(3, 4)).bfloat16()
    assert model[0].weight.is_inference()
    before = digests(model)

    merged = merge(model, ready(model, Adapter({"0": change(4, 3)})))

    assert digests(model) != before
    merged.unmerge()
    assert digests(model) == before


def test_merging_inside_inference_mode_leaves_tensors_that_can_be_trained(tmp_path):
    model = tiny_model()
    with torch.inference_mode():
        merged = merge(model, ready(model, tiny_adapter(tmp_path)))
    tokens = torch.arange(8).reshape(1, 8)

    model(tokens).logits.sum().backward()

    merged.unmerge()
    assert model.lm_head.weight.grad is not None


@pytest.mark.parametrize("layout", ["columns first", "every other row"])
def test_tensors_that_are_not_contiguous_are_merged_in_place(layout):
    model = nn.Sequential(nn.Linear(6, 4, bias=False))
    if layout == "columns first":
        model[0].weight = nn.Parameter(torch.randn(6, 4).T)
    else:
        model[0].weight = nn.Parameter(torch.randn(8, 6)[::2])
    straight = nn.Sequential(nn.Linear(6, 4, bias=False))
    straight[0].weight = nn.Parameter(model[0].weight.detach().clone().contiguous())
    adapter, strides = Adapter({"0": change(4, 6)}), model[0].weight.stride()
    before = digests(model)

    merged = merge(model, ready(model, adapter))
    merge(straight, ready(straight, adapter))

    assert torch.equal(model[0].weight, straight[0].weight)
    assert model[0].weight.stride() == strides
    merged.unmerge()
    assert digests(model) == before


def test_blocks_of_any_size_give_the_same_weights(tmp_path, monkeypatch):
    case = zoo.CASES["experts and all else"]
    zoo.save(case, tmp_path)
    whole, cut = zoo.model(case), zoo.model(case)
    merge(whole, ready(whole, tmp_path))
    monkeypatch.setattr(written, "BLOCK_ELEMENTS", 40)

    merge(cut, ready(cut, tmp_path))

    for name, tensor in whole.state_dict().items():
        assert torch.allclose(tensor, cut.state_dict()[name], rtol=1e-6, atol=0), name


def test_a_whole_number_is_replaced_alone_with_weight_1():
    model = nn.Sequential(nn.BatchNorm1d(3))
    count = Replaced(torch.tensor(2**60 + 1), "modules_to_save")
    adapter = Adapter({}, replaced={"0.num_batches_tracked": count})

    merged = merge(model, ready(model, adapter))

    assert int(model[0].num_batches_tracked) == 2**60 + 1
    merged.unmerge()
    assert int(model[0].num_batches_tracked) == 0
    with pytest.raises(ComposeError, match="no weighted sum"):
        merge(model, ready(model, adapter, weights=(0.5,)))


def test_a_weight_of_zero_touches_nothing(tmp_path):
    model = tiny_model()
    before = digests(model)

    merged = merge(model, ready(model, tiny_adapter(tmp_path), weights=(0.0,)))

    assert digests(model) == before
    assert (merged.report.tensors, merged.report.host_bytes) == ((), 0)


def test_a_weight_that_is_no_finite_number_is_refused(tmp_path):
    model = tiny_model()

    with pytest.raises(InputError, match="expected a finite number"):
        merge(model, ready(model, tiny_adapter(tmp_path), weights=(float("nan"),)))


def written_in_between(model):
    with torch.no_grad():
        model[0].weight[0, 0] += 1


def replaced_in_between(model):
    model[0].weight = nn.Parameter(torch.randn(4, 3))


@pytest.mark.parametrize(
    ("meddle", "problem"),
    [(written_in_between, "written to"), (replaced_in_between, "replaced by another")],
)
def test_what_somebody_wrote_is_not_overwritten_unasked(meddle, problem):
    model = nn.Sequential(nn.Linear(3, 4))
    own, before = model[0].weight, digests(model)
    merged = merge(model, ready(model, Adapter({"0": change(4, 3)})))
    meddle(model)
    theirs = digests(model)

    with pytest.raises(InputError, match=problem) as refused:
        merged.unmerge()

    assert "overwrite=True" in refused.value.hint
    assert digests(model) == theirs
    assert merged.is_merged
    merged.unmerge(overwrite=True)
    assert digests(model) == before
    assert model[0].weight is own
    assert not merged.is_merged


def test_what_torch_does_not_count_is_noticed_where_it_is_asked_for():
    model = nn.Sequential(nn.Linear(3, 4))
    acting = ready(model, Adapter({"0": change(4, 3)}))
    merged = merge(model, acting, verify=True)
    model[0].weight.data[0, 0] += 1

    with pytest.raises(InputError, match="other numbers than were merged"):
        merged.unmerge()


def test_a_model_in_another_dtype_is_not_unmerged_into():
    model = nn.Sequential(nn.Linear(3, 4)).bfloat16()
    before = digests(model)
    merged = merge(model, ready(model, Adapter({"0": change(4, 3)})))
    model.half()

    with pytest.raises(InputError, match=r"is torch\.float16 now"):
        merged.unmerge(overwrite=True)

    model.bfloat16()  # rounded twice
    merged.unmerge(overwrite=True)
    assert digests(model) == before


def test_unmerging_twice_does_nothing(tmp_path):
    model = tiny_model()
    merged = merge(model, ready(model, tiny_adapter(tmp_path)))
    merged.unmerge()
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    after = digests(model)

    merged.unmerge()

    assert digests(model) == after


def checkpoint(folder, dtype="bfloat16"):
    from transformers import AutoModelForCausalLM

    base = tiny_base(folder / "base", dtype=dtype, max_shard_size="4KB")
    return base, AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_base_comes_back_from_its_checkpoint(dtype, tmp_path):
    base, model = checkpoint(tmp_path, dtype)
    before = digests(model)

    merged = merge(model, ready(model, *two_adapters(tmp_path)), keep=base)

    assert digests(model) != before
    assert merged.report.host_bytes == 0
    assert str(base) in str(merged.report)
    merged.unmerge()
    assert digests(model) == before


def test_experts_and_tied_tensors_come_back_from_their_checkpoint(tmp_path):
    from transformers import AutoModelForCausalLM

    case = zoo.CASES["experts"]
    zoo.save(case, tmp_path / "adapter")
    zoo.model(case).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    before = digests(model)

    merged = merge(model, ready(model, tmp_path / "adapter"), keep=tmp_path / "base")

    assert digests(model) != before
    merged.unmerge()
    assert digests(model) == before


def test_a_checkpoint_of_other_numbers_is_refused_before_any_is_touched(tmp_path):
    _, model = checkpoint(tmp_path)
    other = tiny_base(tmp_path / "other", seed=1, dtype="bfloat16")
    before = digests(model)

    with pytest.raises(IntegrityError, match="is not what the checkpoint holds"):
        merge(model, ready(model, *two_adapters(tmp_path)), keep=other)

    assert digests(model) == before


def test_a_checkpoint_without_a_tensor_is_refused(tmp_path):
    base, model = checkpoint(tmp_path)
    tensors = {}
    for file in base.glob("*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    (base / "model.safetensors.index.json").unlink()
    del tensors["model.layers.1.self_attn.v_proj.weight"]
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    before = digests(model)

    with pytest.raises(NotFoundError, match=r"no model\.layers\.1\.self_attn\.v_proj"):
        merge(model, ready(model, *two_adapters(tmp_path)), keep=base)

    assert digests(model) == before


def test_a_checkpoint_that_changed_in_between_is_noticed_before_anything_is_written(
    tmp_path,
):
    base, model = checkpoint(tmp_path)
    merged = merge(model, ready(model, *two_adapters(tmp_path)), keep=base)
    after = digests(model)
    shard = next(
        file for file in base.glob("*.safetensors") if f"{Q0}.weight" in load_file(file)
    )
    with shard.open("r+b") as file:
        file.seek(-2, 2)
        file.write(b"\1\1")
    for each in base.glob("*.safetensors"):
        with each.open("r+b") as file:
            file.seek(-2, 2)
            file.write(b"\1\1")

    with pytest.raises(IntegrityError, match="at the time of merging"):
        merged.unmerge()

    assert digests(model) == after
    assert merged.is_merged


def test_a_checkpoint_replaced_by_another_is_still_the_one_that_is_open(tmp_path):
    base, model = checkpoint(tmp_path)
    before = digests(model)
    merged = merge(model, ready(model, *two_adapters(tmp_path)), keep=base)
    for file in base.glob("*.safetensors"):
        file.unlink()
        file.write_bytes(b"something else")

    merged.unmerge()

    assert digests(model) == before


def test_the_report_says_what_survived():
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 1.0], [1.0, 0.0]]))
    model.bfloat16()
    # Steps at 1 are 2^-7 up: the first is too small by far, the second is whole.
    delta = torch.tensor([[2.0**-10, 2.0**-7], [0.0, 3.0]])
    update = Update(torch.eye(2), delta, torch.ones(2).double())

    merged = merge(model, ready(model, Adapter({"0": update})))

    (tensor,) = merged.report.tensors
    size = float(delta.double().norm()) ** 2
    assert (tensor.elements, tensor.unchanged) == (4, 2)
    assert tensor.kept == pytest.approx((size - 2.0**-20) / size, rel=1e-6)
    assert tensor.lost == pytest.approx(2.0**-10 / size**0.5, rel=1e-3)
    assert merged.report.host_bytes == 8
    assert "8" not in str(merged.report).splitlines()[0].split(" MB")[0].split(": ")[1]


def test_the_reports_text_is_a_short_table(tmp_path):
    model = tiny_model(dtype="bfloat16")
    folder = tiny_adapter(tmp_path, targets="all-linear")

    text = str(merge(model, ready(model, folder)).report)

    lines = text.splitlines()
    assert lines[0].startswith("merged into 14 tensors; to take it back: 0.0 MB of host")
    assert [line.split()[0] for line in lines[1:3]] == ["kept", "in"]
    assert len(lines) == 8
