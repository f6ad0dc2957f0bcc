"""Experts and new rows on a GPU give the answers of the dense weight."""

import pytest
import torch
from torch.nn import functional

from lora_hub.runtime.experts import Term, changed
from lora_hub.runtime.new_rows import with_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator here"),
]

EXPERTS, OUT, INP, TOKENS = 4, 48, 32, 24


@pytest.mark.parametrize("rank", [3, 8, 17])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_products_with_experts_are_as_exact_as_those_of_the_dense_weight(rank, dtype):
    torch.manual_seed(0)
    make = {"device": "cuda", "dtype": dtype}
    own = torch.randn(EXPERTS, OUT, INP, **make)
    term = Term(
        0.5,
        torch.randn(EXPERTS, rank, OUT, **make),
        torch.randn(EXPERTS, rank, INP, **make),
    )
    x = torch.randn(TOKENS, INP, **make)
    ends = torch.tensor([6, 6, 20, TOKENS], device="cuda", dtype=torch.int32)
    of_expert = torch.tensor([0] * 6 + [2] * 14 + [3] * 4, device="cuda")
    whole = own.double() + 0.5 * term.left.double().mT @ term.right.double()
    exact = torch.einsum("ti,toi->to", x.double(), whole[of_expert])
    plain = torch.einsum("ti,toi->to", x, whole.to(dtype)[of_expert]).double()
    matrix = changed(own, [term])

    with torch.no_grad():
        found = {
            "grouped": functional.grouped_mm(x, matrix.mT, offs=ends),
            "gathered": torch.bmm(matrix[of_expert], x.unsqueeze(-1)).squeeze(-1),
            "one by one": torch.stack(
                [
                    functional.linear(row, matrix[expert])
                    for row, expert in zip(x[:, None], of_expert, strict=True)
                ]
            ).squeeze(1),
        }

    floor = torch.finfo(dtype).eps * exact.norm()
    for each in found.values():
        assert (each - exact).norm() <= 2 * (plain - exact).norm() + floor


def test_new_rows_are_looked_up_and_multiplied_with():
    torch.manual_seed(0)
    own = torch.randn(50, INP, device="cuda")
    rows, new = torch.tensor([3, 7, 49], device="cuda"), torch.randn(3, INP, device="cuda")
    whole = own.index_copy(0, rows, new)
    ids, x = torch.arange(50, device="cuda").reshape(5, 10), torch.randn(6, INP).cuda()

    weight = with_rows(own, rows, new)

    assert torch.equal(functional.embedding(ids, weight), whole[ids])
    torch.testing.assert_close(functional.linear(x, weight), functional.linear(x, whole))
