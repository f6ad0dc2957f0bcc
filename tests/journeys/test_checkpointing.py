"""Gradient checkpointing: what is computed again in the backward is what was computed.

The layers run a second time when the block that named the rows is long left. The truth is
the same model without checkpointing, in float64.
"""

import pytest
import torch

import lora_hub
from lora_hub.errors import InputError
from tests.builders import HIDDEN, tiny_adapter, tiny_model

ENTRIES = ["one", None, {"one": 0.5, "two": -1.0}]
TOKENS = 4


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    dora = {"use_dora": True, "targets": ("v_proj", "down_proj"), "seed": 2}
    return {
        "one": tiny_adapter(folder / "one", targets=("q_proj", "up_proj"), rank=3),
        "two": tiny_adapter(folder / "two", **dora),
    }


def attached(folders, reentrant=None):
    model = tiny_model(dtype="float64").train()
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    host = lora_hub.attach(model)
    for name, folder in folders.items():
        host.load(folder, as_=name)
    return model, host


def inputs(seed=0):
    torch.manual_seed(seed)
    shape = (len(ENTRIES), TOKENS, HIDDEN)
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def loss_of(model, x):
    logits = model(inputs_embeds=x, use_cache=False).logits
    return (logits * torch.linspace(-1, 1, logits.numel()).reshape(logits.shape)).sum()


def gradients(model, x):
    return [x.grad, model.get_parameter("model.layers.0.self_attn.q_proj.weight").grad]


def check_same(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-14)


@pytest.fixture
def wanted(folders):
    model, host = attached(folders)
    x = inputs()
    with host.rows(ENTRIES):
        loss_of(model, x).backward()
    return gradients(model, x)


REENTRANT = pytest.mark.parametrize("reentrant", [True, False])


@REENTRANT
def test_a_backward_inside_the_block_is_that_without_checkpointing(
    folders, wanted, reentrant
):
    model, host = attached(folders, reentrant)
    x = inputs()

    with host.rows(ENTRIES):
        loss_of(model, x).backward()

    check_same(gradients(model, x), wanted)


@REENTRANT
def test_a_backward_after_the_block_uses_the_rows_of_its_forward(
    folders, wanted, reentrant
):
    model, host = attached(folders, reentrant)
    x = inputs()

    with host.rows(ENTRIES):
        loss = loss_of(model, x)
    loss.backward()

    check_same(gradients(model, x), wanted)


@REENTRANT
def test_a_backward_inside_a_block_of_others_uses_the_rows_of_its_forward(
    folders, wanted, reentrant
):
    model, host = attached(folders, reentrant)
    x = inputs()

    with host.rows(ENTRIES):
        loss = loss_of(model, x)
    with host.using("two"):
        loss.backward()

    check_same(gradients(model, x), wanted)


@REENTRANT
def test_every_step_of_a_training_uses_its_own_rows(folders, reentrant):
    plain = attached(folders)
    checked = attached(folders, reentrant)

    for step, entries in enumerate([ENTRIES, ENTRIES[::-1], [None] * 3, ["two"] * 3]):
        found = []
        for model, host in (plain, checked):
            model.zero_grad()
            x = inputs(step)
            with host.rows(entries):
                loss = loss_of(model, x)
            loss.backward()
            found.append(gradients(model, x))
        check_same(*found)


@REENTRANT
def test_forwards_of_several_rows_before_one_backward_are_right_or_refused(
    folders, reentrant
):
    plain, plain_host = attached(folders)
    model, host = attached(folders, reentrant)
    x, y = inputs(), inputs()
    with plain_host.rows(ENTRIES):
        loss = loss_of(plain, y)
    with plain_host.using("two"):
        (loss + loss_of(plain, y)).backward()

    with host.rows(ENTRIES):
        loss = loss_of(model, x)
    with host.using("two"):
        loss = loss + loss_of(model, x)
    try:
        loss.backward()
    except InputError as error:
        assert "backward" in f"{error} {error.hint}"  # noqa: PT017  (either is right)
    else:
        check_same(gradients(model, x), gradients(plain, y))


def test_after_what_was_refused_the_next_step_is_right(folders, wanted):
    model, host = attached(folders, reentrant=False)
    x = inputs()
    with host.rows(ENTRIES):
        loss = loss_of(model, inputs())
    with host.using("two"):
        loss = loss + loss_of(model, inputs())
    try:
        loss.backward()
    except InputError:
        model.zero_grad()
    model.zero_grad()

    with host.rows(ENTRIES):
        loss_of(model, x).backward()

    check_same(gradients(model, x), wanted)


@REENTRANT
def test_a_hidden_state_taken_out_is_right_or_refused(folders, reentrant):
    """What passes no output of the model does not say which forward it belongs to."""
    plain, plain_host = attached(folders)
    model, host = attached(folders, reentrant)
    taken = {}
    for each in (plain, model):
        each.model.layers[-1].register_forward_hook(
            lambda layer, _, output, each=each: taken.update({each: output})
        )
    y = inputs()
    with plain_host.using("one"):
        loss_of(plain, y)
    taken[plain].square().sum().backward()

    with host.using("one"):
        x = inputs()
        kept = [loss_of(model, x)]
    hidden = taken[model]
    with host.using("two"):
        kept.append(loss_of(model, inputs()))
        try:
            hidden.square().sum().backward()
        except InputError as error:
            assert "backward" in f"{error} {error.hint}"  # noqa: PT017  (either is right)
        else:
            check_same([x.grad], [y.grad])


@REENTRANT
def test_a_hidden_state_is_not_taken_for_one_of_a_forward_that_had_its_backward(
    folders, reentrant
):
    plain, plain_host = attached(folders)
    model, host = attached(folders, reentrant)
    taken = {}
    for each in (plain, model):
        each.model.layers[-1].register_forward_hook(
            lambda layer, _, output, each=each: taken.update({each: output})
        )
    y = inputs(1)
    with plain_host.using("two"):
        loss_of(plain, y)
        taken[plain].square().sum().backward()
    with host.using("one"):
        kept = loss_of(model, inputs())
        kept.backward()

    with host.using("two"):
        x = inputs(1)
        loss_of(model, x)
        try:
            taken[model].square().sum().backward()
        except InputError as error:
            assert "backward" in f"{error} {error.hint}"  # noqa: PT017  (either is right)
        else:
            check_same([x.grad], [y.grad])
