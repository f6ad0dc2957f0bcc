"""DoRA against its equation, written entry by entry in numpy."""

import numpy as np
import pytest
import torch

from lora_hub.adapter.resolve import resolved, row_norms, with_norms
from lora_hub.adapter.update import Update, delta
from lora_hub.errors import ComposeError, FitError

OUT, INP, RANK = 7, 5, 3


def update(dtype=torch.float32, **fields):
    torch.manual_seed(1)
    plain = {
        "a": torch.randn(RANK, INP).to(dtype),
        "b": torch.randn(OUT, RANK).to(dtype),
        "scaling": torch.tensor([0.5, 0.5, -2.0], dtype=torch.float64),
        "magnitude": torch.rand(OUT, dtype=torch.float64) + 0.5,
    }
    return Update(**plain | fields)


def weight(dtype=torch.float32):
    torch.manual_seed(2)
    return torch.randn(OUT, INP).to(dtype)


def dora(each, base):
    """Return the new weight minus the old one."""
    a, b, w = (tensor.double().numpy() for tensor in (each.a, each.b, base))
    changed = w + b @ np.diag(each.scaling.numpy()) @ a
    for row in range(OUT):
        length = np.sqrt((changed[row] ** 2).sum())
        changed[row] *= float(each.magnitude[row]) / length
    return changed - w


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_change_is_that_of_the_equation(dtype):
    each, base = update(dtype), weight(dtype)

    found = delta(resolved(each, base), base).numpy()

    assert np.abs(found - dora(each, base)).max() <= 1e-14


def test_norms_row_by_row_resolve_to_the_same():
    each, base = update(), weight()

    norms = torch.cat(
        [row_norms(each, base[row : row + 1], slice(row, row + 1)) for row in range(OUT)]
    )

    found, wanted = with_norms(each, norms), resolved(each, base)
    assert torch.allclose(found.p, wanted.p, rtol=1e-15, atol=0)


def test_a_magnitude_of_the_norm_itself_is_plain_lora():
    plain = update(magnitude=None)
    norms = row_norms(plain, weight(), slice(None))

    found = resolved(update(magnitude=norms), weight())

    assert torch.equal(found.p, torch.zeros(OUT).double())
    assert torch.equal(delta(found, weight()), delta(plain))


def test_an_update_without_magnitude_comes_back_as_it_is():
    plain = update(magnitude=None)

    assert resolved(plain, weight()) is plain


def test_refuses_a_row_of_length_zero():
    base = weight()
    base[3] = 0
    each = update(b=torch.zeros(OUT, RANK))

    with pytest.raises(FitError, match="row 3 of the weight") as error:
        resolved(each, base, where="q_proj")

    assert error.value.where == "q_proj"


def test_what_is_not_resolved_has_no_delta_and_no_weight():
    with pytest.raises(ComposeError, match="known only with the base's weight"):
        delta(update(), weight())
    with pytest.raises(ComposeError, match="known only with the base's weight"):
        update().scaled(0.5)
    assert update().scaled(1.0).magnitude is not None
