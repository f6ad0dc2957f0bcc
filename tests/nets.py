"""Small nets, random adapters for them in memory, and what they must give.

The oracle shares no code with the runtime. `exact` puts dense changes into float64 weights;
`plain` is the formula as one would write it in plain torch, `y = Wx + w·s·B(Ax)`, in the
net's own dtype: what errs at most twice as much is as good as plain torch.
"""

import copy
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from lora_hub.adapter.adapter import Adapter
from lora_hub.adapter.update import Update

VOCABULARY, HIDDEN, TOKENS = 13, 8, 5
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Words(nn.Module):
    """Layers that read one input, one stored as (in, out), one that sees a single axis."""

    def __init__(self):
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.q_proj = nn.Linear(HIDDEN, 10)
        self.k_proj = nn.Linear(HIDDEN, 10, bias=False)
        self.v_proj = nn.Linear(HIDDEN, 10)
        self.mix = Conv1D(7, 10)
        self.head = nn.Linear(7, 24)

    def forward(self, tokens):
        x = self.embed(tokens)
        y = torch.tanh(self.q_proj(x)) * self.k_proj(x) + self.v_proj(x)
        z = torch.tanh(self.mix(torch.tanh(y)))
        return self.head(z.flatten(0, 1)).unflatten(0, tokens.shape)

    @staticmethod
    def batch(rows, seed=0):
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, VOCABULARY, (rows, TOKENS), generator=generator)


class Signals(nn.Module):
    """Convolutions, one in groups, and a head; takes numbers, which have gradients."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv1d(3, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 6, (3, 2), stride=(1, 2), groups=2, bias=False)
        self.conv3 = nn.Conv3d(1, 4, (2, 1, 2))
        self.head = nn.Linear(90, 32)

    def forward(self, x):
        image = torch.tanh(self.conv1(x)).unflatten(2, (8, 8))
        volume = torch.tanh(self.conv2(image))[:, None]
        return self.head(torch.tanh(self.conv3(volume)).flatten(2))

    @staticmethod
    def batch(rows, seed=0):
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(rows, 3, 64, generator=generator)


NETS = (Words, Signals)


def net(kind, dtype=torch.float32):
    """Return the net, the same each time, its biases random like all else."""
    torch.manual_seed(5)
    found = kind().eval()
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.normal_(std=0.4)
    return found.to(dtype)


def targets(found):
    return [name for name, _ in found.named_children()]


def matrix(layer):
    """Return a layer's weight as (out, in)."""
    if isinstance(layer, nn.Embedding) or type(layer).__name__ == "Conv1D":
        return layer.weight.T
    if getattr(layer, "groups", 1) > 1:
        return ungrouped(layer).flatten(1)
    return layer.weight.flatten(1)


def ungrouped(layer):
    """Return a grouped convolution's weight over all channels, zero between groups."""
    weight, groups = layer.weight.detach(), layer.groups
    out, each = weight.shape[:2]
    whole = weight.new_zeros(out, each * groups, *weight.shape[2:])
    for group in range(groups):
        rows = slice(group * out // groups, (group + 1) * out // groups)
        whole[rows, group * each : (group + 1) * each] = weight[rows]
    return whole


def update(layer, rank, seed, *, dtype=torch.float32, parts=()):
    """Return a random update of a layer; `parts` of p, q, bias, bias_scale, magnitude."""
    generator = torch.Generator().manual_seed(seed)
    weight = matrix(layer).detach().double()
    out, inp = weight.shape
    groups = getattr(layer, "groups", 1)
    rank *= groups

    def random(*shape):
        return 0.4 * torch.randn(*shape, generator=generator, dtype=torch.float64)

    a, b = random(rank, inp).to(dtype), random(out, rank).to(dtype)
    if groups > 1:  # each group's outputs see that group's share of the rank
        b *= torch.block_diag(*[torch.ones(out // groups, rank // groups)] * groups)
    scaling = 1 + random(rank)
    kinds = {"p": out, "q": inp, "bias": out, "bias_scale": out}
    is_embedding = isinstance(layer, nn.Embedding)
    if is_embedding:  # which have none
        kinds = {"p": out, "q": inp}
    terms = {name: random(size) for name, size in kinds.items() if name in parts}
    if "magnitude" in parts and groups == 1:
        changed = weight + b.double() @ torch.diag(scaling) @ a.double()
        terms["magnitude"] = changed.norm(dim=1) * (1 + random(out))
    is_conv = hasattr(layer, "kernel_size")
    return Update(
        a=a,
        b=b,
        scaling=scaling,
        layer="conv" if is_conv else "embedding" if is_embedding else "linear",
        kernel=layer.kernel_size if is_conv else (),
        groups=groups,
        **terms,
    )


def adapter(found, ranks, seed, **fields):
    """Return a random adapter: target → rank, or all of one rank."""
    if isinstance(ranks, int):
        ranks = dict.fromkeys(targets(found), ranks)
    updates = {
        target: update(getattr(found, target), rank, seed + index, **fields)
        for index, (target, rank) in enumerate(ranks.items())
    }
    return Adapter(dict(sorted(updates.items())))


def resolved(layer, change):
    """Return an update's (p, b·scaling) in float64: DoRA's from the weight."""
    b = change.b.double() @ torch.diag(change.scaling)
    if change.magnitude is None:
        return change.p, b
    weight = matrix(layer).detach().double()
    scale = change.magnitude / (weight + b @ change.a.double()).norm(dim=1)
    return scale - 1, scale[:, None] * b


def change_of(layer, change):
    """Return the dense change of the weight (out, in) and of the bias, in float64."""
    weight = matrix(layer).detach().double()
    p, b = resolved(layer, change)
    dense = b @ change.a.double()
    if p is not None:
        dense += torch.diag(p) @ weight
    if change.q is not None:
        dense += weight @ torch.diag(change.q)
    bias = torch.zeros(len(weight), dtype=torch.float64)
    if change.bias is not None:
        bias += change.bias
    if change.bias_scale is not None and getattr(layer, "bias", None) is not None:
        bias += change.bias_scale * layer.bias.detach().double()
    return dense, bias


def exact(found, acting, dtype=torch.float64):
    """Return a copy of the net with changed weights; acting: pairs (adapter, weight)."""
    result = copy.deepcopy(found).double().requires_grad_(requires_grad=False)
    for target in targets(found):
        layer, own = getattr(found, target), getattr(result, target)
        terms = [(a.updates[target], w) for a, w in acting if target in a.updates]
        if not terms:
            continue
        changes = [(w, *change_of(layer, each)) for each, w in terms]
        whole = matrix(own) + sum(w * dense for w, dense, _ in changes)
        if getattr(own, "groups", 1) > 1:
            own.weight = nn.Parameter(ungrouped(own), requires_grad=False)
            own.groups = 1
        is_turned = matrix(own).shape != own.weight.flatten(1).shape
        is_turned |= isinstance(own, nn.Embedding) or type(own).__name__ == "Conv1D"
        own.weight.copy_(whole.T if is_turned else whole.reshape(own.weight.shape))
        shift = sum(w * bias for w, _, bias in changes)
        if shift.any():
            own.bias = nn.Parameter(
                shift if own.bias is None else own.bias + shift, requires_grad=False
            )
    return result.to(dtype)


class Plain(nn.Module):
    """A layer and its updates, as one writes it down in plain torch."""

    def __init__(self, layer, terms):
        super().__init__()
        self.layer, self.terms = layer, []
        dtype = layer.weight.dtype
        for change, weight in terms:
            p, b = resolved(layer, change)
            own = {"a": change.a, "b": b, "p": p, "q": change.q, "bias": change.bias}
            own["bias_scale"] = change.bias_scale
            own = {name: t.to(dtype) for name, t in own.items() if t is not None}
            self.terms.append((own, weight))

    def forward(self, x):
        y = self.layer(x)
        total = y
        for own, weight in self.terms:
            total = total + weight * self.added(x, y, own)
        return total

    def added(self, x, y, own):
        layer = self.layer
        bias = getattr(layer, "bias", None)
        is_conv = hasattr(layer, "kernel_size")
        tail = (1,) * len(layer.kernel_size) if is_conv else ()

        def shaped(vector):
            return vector.reshape(-1, *tail)

        if isinstance(layer, nn.Embedding):
            added = functional.embedding(x, own["a"].T) @ own["b"].T
            if "q" in own:
                added = added + own["q"][x][..., None] * y
        elif is_conv:
            conv = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
            run = conv[len(tail)]
            where = {"stride": layer.stride, "padding": layer.padding}
            kernel = own["a"].reshape(len(own["a"]), -1, *layer.kernel_size)
            added = run(run(x, kernel, **where), own["b"].reshape(*own["b"].shape, *tail))
            if "q" in own:
                weight = ungrouped(layer) if layer.groups > 1 else layer.weight
                scaled = weight * own["q"].reshape(weight.shape[1:])
                added = added + run(x, scaled, **where)
        else:
            added = x @ own["a"].T @ own["b"].T
            if "q" in own:
                added = added + (x * own["q"]) @ matrix(layer).T
        if "p" in own:
            own_output = y if bias is None else y - shaped(bias)
            added = added + shaped(own["p"]) * own_output
        if "bias" in own:
            added = added + shaped(own["bias"])
        if "bias_scale" in own and bias is not None:
            added = added + shaped(own["bias_scale"] * bias)
        return added


def plain(found, acting):
    """Return a copy of the net whose layers run the formula in the net's dtype."""
    result = copy.deepcopy(found)
    for target in targets(found):
        layer = getattr(result, target)
        terms = [(a.updates[target], w) for a, w in acting if target in a.updates]
        if terms:
            setattr(result, target, Plain(layer, terms))
    return result


def check_is_as_exact_as_plain(found, wanted, other, dtype):
    """Fail where the error is above twice plain torch's, and above one rounding."""
    rounding = torch.finfo(dtype).eps / 2  # of the answer itself, which both must make
    bound = 2 * (other.double() - wanted).norm() + rounding * wanted.norm()
    error = (found.double() - wanted).norm()
    assert error <= bound, f"an error of {error:.3g}, expected at most {bound:.3g}"


# What a caller may wrap a forward in.
MODES = {
    "no_grad": torch.no_grad,
    "grad": nullcontext,
    "inference_mode": torch.inference_mode,
}

weights = st.sampled_from([1.0, 0.5, -1.0, 2.5, 0.0, -0.3, 1e-3])
PARTS = ((), ("magnitude",), ("bias",), ("p", "bias_scale"), ("q",), ("p", "q", "bias"))


@dataclass(frozen=True)
class Drawn:
    """What hypothesis drew, told shortly; `made` makes a net and its adapters of it."""

    kind: type
    dtype: torch.dtype
    adapters: dict  # name → (target → rank, seed, dtype of the factors, parts)

    def made(self):
        found = net(self.kind, self.dtype)
        loaded = {
            name: adapter(found, ranks, seed, dtype=dtype, parts=parts)
            for name, (ranks, seed, dtype, parts) in self.adapters.items()
        }
        return found, loaded


@st.composite
def drawn(draw, names, *, kinds=NETS, dtypes=DTYPES, parts=PARTS):
    """Draw a net and adapters: some targets, mixed ranks and dtypes, one kind of parts."""
    kind = draw(st.sampled_from(kinds))
    layers = targets(kind())
    adapters = {}
    for name in names:
        chosen = draw(st.sets(st.sampled_from(layers), min_size=1))
        ranks = {target: draw(st.integers(1, 5)) for target in sorted(chosen)}
        seed = draw(st.integers(0, 2**20))
        own = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(parts))
        adapters[name] = (ranks, seed, *own)
    return Drawn(kind, draw(st.sampled_from(dtypes)), adapters)


@st.composite
def batches(draw, names, *, most=6):
    """Return the entries of a batch: None, a name, or names with weights."""
    entry = st.one_of(
        st.none(),
        st.sampled_from(names),
        st.dictionaries(st.sampled_from(names), weights, max_size=len(names)),
    )
    return draw(st.lists(entry, min_size=1, max_size=most))


def acting_of(entry, loaded):
    """Return (adapter, weight) of an entry of `rows`."""
    if entry is None:
        return []
    named = {entry: 1.0} if isinstance(entry, str) else entry
    return [(loaded[name], weight) for name, weight in named.items() if weight]
