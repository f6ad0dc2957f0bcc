"""What is saved is read back by our own reader and by PEFT, which must both do the same."""

import math
from dataclasses import replace

import pytest
import torch
from peft import PeftModel

from lora_hub.adapter.adapter import Adapter, Replaced
from lora_hub.adapter.load import load
from lora_hub.adapter.save import save, to_source
from lora_hub.adapter.update import Update, delta
from lora_hub.composing.compose import compose
from lora_hub.errors import FormatError, StoreError
from lora_hub.formats.detect import open_adapter
from lora_hub.runtime.host import Host
from tests.builders import logits, tiny_adapter, tiny_model

Q = "model.layers.0.self_attn.q_proj"
V = "model.layers.1.self_attn.v_proj"


def adapter(scaling, dtype=torch.float32, target=Q, out=16):
    torch.manual_seed(0)
    rank = len(scaling)
    update = Update(
        a=torch.randn(rank, 16).to(dtype),
        b=torch.randn(out, rank).to(dtype),
        scaling=torch.tensor(scaling, dtype=torch.float64),
    )
    return Adapter({target: update})


def read_back(given):
    source = to_source(given)
    return load(source).updates


def test_one_scaling_keeps_factors_and_delta_bit_for_bit():
    given = adapter([16 / math.sqrt(3)] * 3)

    back = read_back(given)[Q]

    assert torch.equal(back.a, given.updates[Q].a)
    assert torch.equal(back.b, given.updates[Q].b)
    assert torch.equal(delta(back), delta(given.updates[Q]))


def test_a_sign_goes_into_b_without_rounding_and_alpha_stays_positive():
    given = adapter([-2.0, 2.0, -2.0], torch.bfloat16)

    source = to_source(given)

    assert source.updates[0].alpha == 6
    back = load(source).updates[Q]
    assert back.b.dtype == torch.bfloat16
    assert torch.equal(delta(back), delta(given.updates[Q]))


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_unlike_scalings_round_b_once(dtype, stored):
    given = adapter([0.6, 0.7, 0.6], dtype)
    update = given.updates[Q]

    back = read_back(given)[Q]

    assert back.a.dtype == back.b.dtype == stored
    # The columns of the most common scaling keep their bits.
    assert torch.equal(back.b[:, ::2], update.b[:, ::2].to(stored))
    epsilon = torch.finfo(stored).eps
    error = (delta(back) - delta(update)).norm() / delta(update).norm()
    assert error <= epsilon


def test_scalings_that_differ_by_powers_of_two_stay_exact_in_bfloat16():
    given = adapter([4.0, 2.0, -1.0], torch.bfloat16)

    back = read_back(given)[Q]

    assert back.b.dtype == torch.bfloat16
    assert torch.equal(delta(back), delta(given.updates[Q]))


def test_an_adapter_of_zeros_stays_one():
    back = read_back(adapter([0.0, 0.0]))[Q]

    assert not delta(back).any()


@pytest.mark.parametrize("field", ["p", "q", "bias_scale"])
def test_refuses_by_name_what_lora_cannot_say(field):
    given = adapter([1.0])
    update = given.updates[Q]
    parts = {field: torch.ones(16, dtype=torch.float64)}

    with pytest.raises(FormatError, match="LoRA file cannot say") as error:
        to_source(Adapter({Q: Update(update.a, update.b, update.scaling, **parts)}))

    assert error.value.where == Q


def test_refuses_an_update_without_factors():
    nothing = Update(torch.zeros(0, 16), torch.zeros(16, 0), torch.zeros(0).double())

    with pytest.raises(FormatError, match="has no factors"):
        to_source(Adapter({Q: nothing}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_magnitude_and_bias_come_back_bit_for_bit(dtype):
    plain = adapter([16 / math.sqrt(3)] * 3, dtype).updates[Q]
    bias = torch.randn(16).to(dtype).double() * plain.scaling[0]
    magnitude = torch.rand(16).to(dtype).double()

    found = to_source(Adapter({Q: replace(plain, bias=bias, magnitude=magnitude)}))

    name = {torch.float32: "F32", torch.bfloat16: "BF16"}[dtype]
    assert (found.updates[0].bias.dtype, found.updates[0].magnitude.dtype) == (name, name)
    back = load(found).updates[Q]
    assert torch.equal(back.bias, bias)
    assert torch.equal(back.magnitude, magnitude)


def test_beside_a_bias_other_targets_get_one_of_zero():
    with_bias = replace(adapter([2.0]).updates[Q], bias=torch.ones(16).double())

    back = read_back(Adapter({Q: with_bias, **adapter([2.0], target=V).updates}))

    assert torch.equal(back[Q].bias, torch.ones(16).double())
    assert not back[V].bias.any()


@pytest.mark.parametrize(
    "update",
    [
        Update(
            torch.randn(2, 12),
            torch.randn(4, 2),
            torch.ones(2).double(),
            layer="conv",
            kernel=(3, 1),
        ),
        Update(
            torch.randn(2, 12),
            torch.block_diag(torch.randn(2, 1), torch.randn(2, 1)),
            torch.ones(2).double(),
            layer="conv",
            kernel=(3,),
            groups=2,
        ),
        Update(
            torch.randn(3, 2, 5),
            torch.randn(3, 4, 2),
            torch.ones(2).double(),
            layer="experts",
        ),
        Update(
            torch.randn(2, 9), torch.randn(4, 2), torch.ones(2).double(), layer="embedding"
        ),
    ],
)
def test_every_kind_of_layer_comes_back_bit_for_bit(update):
    back = read_back(Adapter({"x": update}))["x"]

    assert (back.layer, back.kernel, back.groups) == (
        update.layer,
        update.kernel,
        update.groups,
    )
    assert torch.equal(back.a, update.a)
    assert torch.equal(back.b, update.b)


def test_replaced_tensors_and_what_belongs_to_the_whole_come_back():
    rows = Replaced(torch.randn(2, 16).bfloat16(), "token_delta", (3, 1))
    given = replace(
        adapter([1.0]),
        replaced={"model.embed_tokens.weight": rows},
        alora_tokens=(1, 2),
        ties_weights=True,
    )

    back = load(to_source(given))

    found = back.replaced["model.embed_tokens.weight"]
    assert (found.role, found.rows) == ("token_delta", (3, 1))
    assert torch.equal(found.tensor, rows.tensor)
    assert (back.alora_tokens, back.ties_weights) == ((1, 2), True)


def test_refuses_a_folder_that_holds_something(tmp_path):
    (tmp_path / "mine").write_text("")

    with pytest.raises(StoreError, match="not empty"):
        save(adapter([1.0]), tmp_path)


def test_peft_does_the_same_with_what_was_saved(tmp_path):
    # Unlike ranks, scalings and target sets, a negative weight and one shared target.
    one = load(open_adapter(tiny_adapter(tmp_path / "one", rank=2, alpha=3)))
    two = load(
        open_adapter(
            tiny_adapter(
                tmp_path / "two",
                rank=3,
                alpha=5,
                use_rslora=True,
                targets=("v_proj", "down_proj"),
                seed=2,
            )
        )
    )
    both = compose([(one, 0.7), (two, -0.4)])

    save(both, tmp_path / "both", base_name="tiny-lab/tiny-llama")

    theirs = PeftModel.from_pretrained(tiny_model(), tmp_path / "both").eval()
    model = tiny_model()
    host = Host(model)
    host.load(one, as_="one")
    host.load(two, as_="two")
    host.use({"one": 0.7, "two": -0.4})
    ours = logits(model)
    assert (logits(theirs) - ours).abs().max() <= 1e-5 * ours.abs().max()
    assert (ours - logits(tiny_model())).abs().max() > 0.01
