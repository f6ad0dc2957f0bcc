"""The oracle is the layer with a changed weight, computed in float64."""

import copy
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from lora_hub.adapter.adapter import Adapter
from lora_hub.adapter.update import Update
from lora_hub.errors import InputError
from lora_hub.runtime.host import Host

OUT, INP = 6, 5


def layer(dtype=torch.float64, *, bias=True):
    torch.manual_seed(3)
    return nn.Linear(INP, OUT, bias=bias).to(dtype).requires_grad_(requires_grad=False)


def update(dtype=torch.float64, rank=2, seed=4, **fields):
    torch.manual_seed(seed)
    return Update(
        a=torch.randn(rank, INP).to(dtype),
        b=torch.randn(OUT, rank).to(dtype),
        scaling=torch.randn(rank, dtype=torch.float64),
        **{name: torch.randn(size, dtype=torch.float64) for name, size in fields.items()},
    )


@contextmanager
def acting(module, terms, rows=None):
    """Give a model of this one layer, on which the updates act, or some on each row."""
    model = nn.Sequential(module)
    host = Host(model)
    for index, (each, _) in enumerate(terms):
        host.load(Adapter({"0": each}), as_=str(index))
    used = {str(index): weight for index, (_, weight) in enumerate(terms)}
    with host.using(used) if rows is None else host.rows(rows):
        yield model


def attached(module, terms, x):
    with acting(module, terms) as model:
        return model(x)


def changed(module, terms, x):
    """Return the output of the layer whose weight and bias hold the deltas."""
    weight = module.weight.double()
    total = weight.clone()
    bias = torch.zeros(OUT).double() if module.bias is None else module.bias.double()
    for each, w in terms:
        s = torch.diag(each.scaling)
        total += w * each.b.double() @ s @ each.a.double()
        if each.p is not None:
            total += w * torch.diag(each.p) @ weight
        if each.q is not None:
            total += w * weight @ torch.diag(each.q)
        if each.bias is not None:
            bias = bias + w * each.bias
    return linear(x.double(), total, bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("fields", [{}, {"p": OUT}, {"q": INP}, {"bias": OUT}])
def test_output_is_that_of_the_changed_weight(bias, fields):
    module = layer(bias=bias)
    terms = [(update(**fields), 0.7), (update(rank=3, seed=5, **fields), -1.3)]
    x = torch.randn(2, 3, INP, dtype=torch.float64)

    found = attached(module, terms, x)

    assert (found - changed(module, terms, x)).abs().max() <= 1e-13


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16, torch.float16])
def test_gives_the_layers_dtype_and_errs_as_little_as_torch_in_it(base, factors):
    module = layer(base)
    terms = [(update(factors), 0.7)]
    x = torch.randn(64, INP, dtype=base)

    found = attached(module, terms, x)

    wanted = changed(module, terms, x)
    # Plain torch: the changed weight rounded to the layer's dtype, then the layer.
    s = torch.diag(terms[0][0].scaling)
    dense = 0.7 * terms[0][0].b.double() @ s @ terms[0][0].a.double()
    plain = linear(x, (module.weight.double() + dense).to(base), module.bias)
    assert found.dtype == base
    assert (found - wanted).norm() <= 2 * (plain - wanted).norm()


def test_takes_the_input_by_name_too():
    module = layer()
    terms = [(update(), 1.0)]
    x = torch.randn(2, INP, dtype=torch.float64)

    with acting(module, terms):
        found = module(input=x)

    assert torch.equal(found, attached(module, terms, x))


def test_gradients_flow_through_to_the_input():
    module = layer()
    terms = [(update(p=OUT, q=INP), 0.7), (update(seed=5), 1.0)]
    x = torch.randn(2, INP, dtype=torch.float64, requires_grad=True)
    (wanted,) = torch.autograd.grad(changed(module, terms, x).sum(), x)

    attached(module, terms, x).sum().backward()

    assert torch.allclose(x.grad, wanted)
    assert module.weight.grad is None


def test_is_used_in_training_although_made_in_inference_mode():
    model = nn.Sequential(layer())
    host = Host(model)
    with torch.inference_mode():
        host.load(Adapter({"0": update()}), as_="mine")
        host.use("mine")
        model(torch.randn(3, INP, dtype=torch.float64))
    x = torch.randn(3, INP, dtype=torch.float64, requires_grad=True)

    model(x).sum().backward()

    assert x.grad is not None


def test_a_dry_run_on_the_meta_device_loses_no_number():
    module, terms = layer(), [(update(), 1.0)]
    x = torch.randn(3, INP, dtype=torch.float64)

    with acting(module, terms) as model:
        shape = copy.deepcopy(model).to("meta")(x.to("meta")).shape
        found = model(x)

    assert shape == (3, OUT)
    assert torch.allclose(found, changed(module, terms, x))


def test_what_another_hook_kept_of_the_output_stays_as_it_was():
    module, kept = layer(), []
    module.register_forward_hook(lambda _module, _args, output: kept.append(output))
    x = torch.randn(3, INP, dtype=torch.float64)

    with torch.no_grad():
        attached(module, [(update(), 1.0)], x)

    assert torch.equal(kept[0], linear(x, module.weight, module.bias))


def test_a_layer_that_gives_its_input_back_does_not_change_it():
    class Same(nn.Linear):
        def forward(self, x):
            return x

    module = Same(INP, INP).double()
    x = torch.randn(3, INP, dtype=torch.float64)
    before = x.clone()
    square = Update(torch.ones(1, INP), torch.ones(INP, 1), torch.ones(1).double())

    with torch.no_grad():
        attached(module, [(square, 1.0)], x)

    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("fields", [{}, {"p": OUT, "bias": OUT}])
def test_each_row_gets_its_own_sum_of_updates(dtype, fields):
    module = layer(dtype)
    terms = [(update(dtype, **fields), 1.0), (update(dtype, rank=3, seed=5), 1.0)]
    rows = [{"0": 0.5, "1": -1.0}, None, "1", {"0": 2.0}, "1", {"0": 0.5}]
    x = torch.randn(len(rows), 4, INP).to(dtype)

    with torch.no_grad(), acting(module, terms, rows) as model:
        found = model(x)

    for row, entry in enumerate(rows):
        alone = {entry: 1.0} if isinstance(entry, str) else entry or {}
        own = [(terms[int(name)][0], weight) for name, weight in alone.items()]
        wanted = changed(module, own, x[row])
        error = (found[row].double() - wanted).abs().max()
        assert error <= 16 * torch.finfo(dtype).eps * wanted.abs().max()
    bare = linear(x[1], module.weight, module.bias)
    assert torch.equal(found[1], bare)


def test_other_rows_than_there_are_entries_are_refused_with_the_layer_named():
    module = layer()

    with (
        acting(module, [(update(), 1.0)], ["0", None]),
        pytest.raises(InputError, match=r"was given \[3, 5\], and 2 rows have") as error,
    ):
        module(torch.randn(3, INP, dtype=torch.float64))

    assert error.value.where == "0"
