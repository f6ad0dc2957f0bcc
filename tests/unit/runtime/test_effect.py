"""The oracle is the layer with a changed weight, computed in float64."""

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from lora_hub.adapter.update import Update
from lora_hub.runtime.effect import Effect

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


def attached(module, terms, x):
    hook = module.register_forward_hook(Effect(terms, module), with_kwargs=True)
    try:
        return module(x)
    finally:
        hook.remove()


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
    effect = Effect(terms, module)

    hook = module.register_forward_hook(effect, with_kwargs=True)
    found = module(input=x)
    hook.remove()

    assert torch.equal(found, attached(module, terms, x))


def test_gradients_flow_through_to_the_input():
    module = layer()
    x = torch.randn(2, INP, dtype=torch.float64, requires_grad=True)

    attached(module, [(update(), 1.0)], x).sum().backward()

    assert x.grad is not None
    assert module.weight.grad is None


def test_is_used_in_training_although_made_in_inference_mode():
    with torch.inference_mode():
        terms = [(update(), 1.0)]
        effect = Effect(terms, layer())
    module = layer()
    module.register_forward_hook(effect, with_kwargs=True)
    x = torch.randn(3, INP, dtype=torch.float64, requires_grad=True)

    module(x).sum().backward()

    assert x.grad is not None


def test_a_dry_run_on_the_meta_device_loses_no_number():
    module, terms = layer(), [(update(), 1.0)]
    effect = Effect(terms, module)
    x = torch.randn(3, INP, dtype=torch.float64)
    dry = x.to("meta")

    shape = effect(layer().to("meta"), (dry,), {}, torch.empty(3, OUT, device="meta")).shape

    assert shape == (3, OUT)
    found = effect(module, (x,), {}, module(x))
    assert torch.allclose(found, changed(module, terms, x))


def test_knows_when_its_dtype_cannot_hold_the_numbers():
    terms = [(update(torch.float16), 1e6)]

    assert not Effect(terms, layer(torch.float16)).is_finite
    assert Effect(terms, layer(torch.float32)).is_finite
