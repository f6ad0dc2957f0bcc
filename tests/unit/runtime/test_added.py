"""The oracle is torch's own layer with a changed weight, in float64."""

import pytest
import torch
from torch import nn

from lora_hub.adapter.adapter import Adapter
from lora_hub.adapter.update import Update
from lora_hub.runtime.host import Host

IN, OUT, RANK = 4, 6, 2


def attached(module, update, x):
    model = nn.Sequential(module)
    host = Host(model)
    host.load(Adapter({"0": update}), as_="mine")
    with host.using("mine"):
        return model(x)


@pytest.mark.parametrize(
    "settings",
    [
        {"kernel_size": 3},
        {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0)},
        {"kernel_size": 3, "padding": "same"},
        {"kernel_size": 3, "dilation": 2, "padding": 2},
        {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
        {"kernel_size": (2, 3), "padding": "same", "padding_mode": "circular"},
        {"kernel_size": 3, "groups": 2, "bias": False},
        {"kernel_size": 1, "padding_mode": "replicate", "padding": 1},
    ],
)
@pytest.mark.parametrize("batch", [(), (2,)])
def test_a_convolution_gives_what_the_changed_weight_would(settings, batch):
    torch.manual_seed(1)
    module = nn.Conv2d(IN, OUT, **settings).double()
    size = module.kernel_size[0] * module.kernel_size[1] * IN
    update = Update(
        torch.randn(RANK, size).double(),
        torch.randn(OUT, RANK).double(),
        torch.randn(RANK).double(),
        p=torch.randn(OUT).double(),
        q=torch.randn(size).double(),
        bias=torch.randn(OUT).double(),
        bias_scale=torch.randn(OUT).double(),
        layer="conv",
        kernel=module.kernel_size,
        groups=module.groups,
    )
    x = torch.randn(*batch, IN, 7, 8).double()

    found = attached(module, update, x)

    assert torch.allclose(found, changed(module, update)(x), atol=1e-12)


def changed(module, update):
    """Return an ungrouped twin of the layer whose weight and bias hold the changes."""
    settings = {
        name: getattr(module, name)
        for name in ("kernel_size", "stride", "padding", "dilation", "padding_mode")
    }
    twin = nn.Conv2d(IN, OUT, **settings).double()
    whole = torch.zeros_like(twin.weight)
    each, rows = IN // module.groups, OUT // module.groups
    for group in range(module.groups):
        out = slice(group * rows, (group + 1) * rows)
        whole[out, group * each : (group + 1) * each] = module.weight.detach()[out]
    low = update.b @ torch.diag(update.scaling) @ update.a
    columns = update.q.reshape(1, IN, *module.kernel_size)
    scaled = whole * (1 + update.p.reshape(-1, 1, 1, 1) + columns)
    twin.weight = nn.Parameter(scaled + low.reshape(whole.shape))
    bias = torch.zeros(OUT) if module.bias is None else module.bias.detach()
    twin.bias = nn.Parameter(bias * (1 + update.bias_scale) + update.bias)
    return twin


@pytest.mark.parametrize("scale", [None, 2.5])
def test_an_embedding_gives_what_the_changed_weight_would(scale):
    torch.manual_seed(1)
    module = nn.Embedding(9, OUT, padding_idx=0).double()
    if scale is not None:
        module = Scaled(9, OUT, scale)
    update = Update(
        torch.randn(RANK, 9).double(),
        torch.randn(OUT, RANK).double(),
        torch.randn(RANK).double(),
        p=torch.randn(OUT).double(),
        q=torch.randn(9).double(),
        layer="embedding",
    )
    ids = torch.tensor([[0, 3, 8], [3, 1, 0]])

    found = attached(module, update, ids)

    low = update.b @ torch.diag(update.scaling) @ update.a
    weight = module.weight.detach().T
    new = weight + low + torch.diag(update.p) @ weight + weight @ torch.diag(update.q)
    assert torch.allclose(found, (scale or 1) * new.T[ids], atol=1e-12)


class Scaled(nn.Embedding):
    def __init__(self, count, size, scale):
        super().__init__(count, size)
        self.embed_scale = scale
        self.double()

    def forward(self, x):
        return self.embed_scale * super().forward(x)
