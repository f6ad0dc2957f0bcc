"""The tensor in a replaced one's place: each adapter makes of it what it alone would."""

import pytest
import torch
from torch import nn

from lora_hub.adapter.adapter import Replaced
from lora_hub.runtime.replaced import KEPT, Kept, Part, dropped_of, parts_of, replaced_by
from lora_hub.runtime.resident import Factors, Resident

OUT, INP = 4, 3


def replaced(seed=1, rows=None, dtype=torch.float32, shape=(OUT, INP)):
    torch.manual_seed(seed)
    size = shape if rows is None else (len(rows), *shape[1:])
    return Replaced(torch.randn(size).to(dtype), "modules_to_save", rows)


def scales(**vectors):
    return Factors(torch.zeros(0, INP), torch.zeros(0, OUT), **vectors)


def resident(module, key="one", at=None, **new):
    return Resident(key, key, at or {}, replaced={(module, n): r for n, r in new.items()})


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return nn.Linear(INP, OUT)


def made(layer, *parts):
    return replaced_by(layer.weight.detach(), parts, layer)


def test_alone_with_weight_one_it_is_the_adapters_bits_in_the_dtype_of_the_layer(layer):
    assert torch.equal(made(layer, Part(1.0, replaced())), replaced().tensor)
    layer.bfloat16()
    assert torch.equal(made(layer, Part(1.0, replaced())), replaced().tensor.bfloat16())


def test_rows_take_the_place_of_rows(layer):
    new, own = replaced(rows=(2, 0)), layer.weight.detach()

    found = made(layer, Part(1.0, new))

    assert torch.equal(found, torch.stack([new.tensor[1], own[1], new.tensor[0], own[3]]))


def test_weights_count_the_difference_to_the_base(layer):
    one, two = replaced(1), replaced(2, rows=(1, 3))

    found = made(layer, Part(0.5, one), Part(-2.0, two))

    own = layer.weight.detach().double()
    wanted = own + 0.5 * (one.tensor.double() - own)
    wanted[[1, 3]] += -2.0 * (two.tensor.double() - own[[1, 3]])
    assert (found - wanted).abs().max() <= 1e-6


def test_rows_of_two_adapters_that_do_not_meet_keep_their_bits(layer):
    one, two = replaced(1, rows=(0,)), replaced(2, rows=(3,))

    found = made(layer, Part(1.0, one), Part(1.0, two))

    assert torch.equal(found[0], one.tensor[0])
    assert torch.equal(found[3], two.tensor[0])
    assert torch.equal(found[1:3], layer.weight[1:3])


def test_an_adapter_scales_what_it_alone_replaces(layer):
    new, p, q = replaced(), torch.randn(OUT), torch.randn(INP)
    one = resident(layer, "one", {0: scales(p=p)}, weight=new)
    two = resident(layer, "two", {0: scales(q=q)})
    acting = ((one, 0.5), (two, 2.0))

    parts = parts_of(acting, layer, 0)

    own, its = layer.weight.detach().double(), new.tensor.double()
    wanted = own + 0.5 * (its - own + p[:, None] * its) + 2.0 * q * own
    assert parts.keys() == {"weight"}
    assert (made(layer, *parts["weight"]) - wanted).abs().max() <= 1e-6
    assert dropped_of(acting, layer) == {"p", "q"}


def test_a_new_bias_takes_the_scaled_rows_of_the_weight_along_and_leaves_its_columns(layer):
    p, q, own_bias = torch.randn(OUT), torch.randn(INP), torch.randn(OUT)
    both = scales(p=p, q=q, bias_scale=own_bias)
    one = resident(layer, "one", {0: both}, bias=replaced(shape=(OUT,)))
    acting = ((one, 0.5),)

    parts = parts_of(acting, layer, 0)

    own, bias = layer.weight.detach().double(), layer.bias.detach().double()
    its = replaced(shape=(OUT,)).tensor.double()
    assert torch.allclose(
        made(layer, *parts["weight"]).double(), own + 0.5 * p[:, None] * own, atol=1e-6
    )
    assert torch.allclose(
        replaced_by(layer.bias.detach(), parts["bias"], layer).double(),
        bias + 0.5 * (its * (1 + own_bias) - bias),
        atol=1e-6,
    )
    assert dropped_of(acting, layer) == {"p", "bias_scale"}


def test_columns_of_a_grouped_convolution_are_scaled_by_its_channels():
    """With as many columns in a row of the weight as there are channels in all groups."""
    torch.manual_seed(0)
    conv = nn.Conv1d(4, 6, 2, groups=2)
    new = Replaced(torch.randn(6, 2, 2), "modules_to_save")
    q = torch.tensor([0.5, -0.25, 2.0, 1.0])
    its = Factors(torch.zeros(0, 4), torch.zeros(0, 6), layer="conv", q=q)

    found = replaced_by(conv.weight.detach(), [Part(1.0, new, its)], conv)

    factors = (1 + q).reshape(2, 1, 2, 1)  # groups, rows, channels of the group
    wanted = (new.tensor.reshape(2, 3, 2, 2) * factors).reshape(6, 2, 2)
    assert torch.allclose(found, wanted)


def kept(store, layer, acting):
    return store.tensor(layer.weight, acting, parts_of(acting, layer, None)["weight"])


def test_a_new_tensor_is_made_once_and_again_when_the_models_own_changes(layer):
    store, acting = Kept(layer), ((resident(layer, weight=replaced()), 0.5),)

    first = kept(store, layer, acting)
    second = kept(store, layer, acting)
    with torch.no_grad():
        layer.weight.fill_(7)
    third = kept(store, layer, acting)

    assert first is second
    assert torch.allclose(third, 7 + 0.5 * (replaced().tensor - 7))
    assert store.nbytes == third.nbytes


def test_of_new_rows_the_rows_alone_are_kept():
    torch.manual_seed(0)
    table, head = nn.Embedding(9, INP), nn.Linear(INP, 9)
    ids, x = torch.tensor([[0, 4, 8], [2, 7, 4]]), torch.randn(2, INP)
    for layer, given, look in (
        (table, ids, nn.functional.embedding),
        (head, x, nn.functional.linear),
    ):
        one = resident(layer, "one", weight=replaced(1, (7, 4, 0), shape=(9, INP)))
        two = resident(layer, "two", weight=replaced(2, (4, 8), shape=(9, INP)))
        acting, store = ((one, 1.0), (two, -0.5)), Kept(layer)
        parts = parts_of(acting, layer, None)["weight"]

        found = look(given, kept(store, layer, acting))

        wanted = look(given, replaced_by(layer.weight.detach(), parts, layer))
        assert torch.allclose(found, wanted, atol=1e-6)
        assert store.nbytes == 4 * INP * 4  # the rows 0, 4, 7 and 8, in float32
        assert torch.equal(
            kept(store, layer, acting) + 0, replaced_by(layer.weight, parts, layer)
        )


def test_an_adapters_own_tensor_is_given_as_it_is_and_not_held(layer):
    store, new = Kept(layer), replaced()

    found = kept(store, layer, ((resident(layer, weight=new), 1.0),))

    assert found is new.tensor
    assert store.nbytes == 0


def test_sets_are_kept_by_identity_and_weight_and_the_oldest_one_goes(layer):
    store, one = Kept(layer), resident(layer, weight=replaced())

    found = [kept(store, layer, ((one, 0.5 + n),)) for n in range(1, KEPT + 3)]

    assert len({id(each) for each in found}) == KEPT + 2
    assert store.nbytes == KEPT * found[0].nbytes
    assert kept(store, layer, ((one, 0.5 + KEPT + 2),)) is found[-1]
    same = resident(layer, weight=replaced())  # another object of the same package
    assert kept(store, layer, ((same, 0.5 + KEPT + 2),)) is found[-1]


def test_what_was_made_in_inference_mode_can_be_used_in_training(layer):
    with torch.inference_mode():
        found = kept(Kept(layer), layer, ((resident(layer, weight=replaced()), 0.5),))

    x = torch.ones(2, INP, requires_grad=True)
    (x @ found.T).sum().backward()
    assert torch.equal(x.grad[0], found.sum(0))


def test_a_tensor_that_came_to_lie_where_another_one_was_is_another_one():
    layer = nn.Linear(64, 512, bias=False)
    new = torch.randn(512, 64)
    acting = ((resident(layer, weight=Replaced(new, role="modules_to_save")), 0.5),)
    store = Kept(layer)

    for _ in range(20):
        layer.weight = nn.Parameter(torch.zeros(1))  # so that the memory is free
        layer.weight = nn.Parameter(torch.randn(512, 64))

        found = kept(store, layer, acting)

        assert torch.allclose(found, 0.5 * layer.weight + 0.5 * new)
