"""Experts' weights with changes that stay apart give what the dense sum gives."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from lora_hub.errors import ComposeError, FitError, InputError
from lora_hub.runtime.experts import Term, changed
from lora_hub.runtime.resident import Factors, Resident
from lora_hub.runtime.route import by_rows, for_all
from lora_hub.runtime.sites import Sites
from lora_hub.runtime.step import Step
from lora_hub.runtime.twins import Twins

EXPERTS, OUT, INP = 3, 8, 4


def stack(dtype=torch.float64, *, ranks=(2, 3), weights=(1.0, -0.5)):
    torch.manual_seed(0)
    own = torch.randn(EXPERTS, OUT, INP, dtype=dtype)
    terms = [
        Term(
            weight,
            torch.randn(EXPERTS, rank, OUT, dtype=dtype),
            torch.randn(EXPERTS, rank, INP, dtype=dtype),
        )
        for weight, rank in zip(weights, ranks, strict=True)
    ]
    return changed(own, terms)


def sum_of(matrix):
    """Return the dense sum, by a way of its own."""
    total = matrix.form.own.double()
    for term in matrix.form.terms:
        total = total + term.weight * torch.einsum(
            "...ro,...ri->...oi", term.left.double(), term.right.double()
        )
    return total


X = torch.randn(5, INP, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
BACK = torch.randn(5, OUT, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
IDS = torch.tensor([2, 0, 0, 1])
OFFS = torch.tensor([2, 2, 5], dtype=torch.int32)
BATCH, BATCH_BACK = X.expand(EXPERTS, 5, INP), BACK.expand(EXPERTS, 5, OUT)

# What models ask of experts' weights, without a dense sum.
WAYS = {
    "linear": lambda w: functional.linear(X, w[1]),
    "linear with a bias": lambda w: functional.linear(X, w[1], torch.ones(OUT).double()),
    "an expert named by a tensor": lambda w: functional.linear(X, w[torch.tensor(2)]),
    "an expert of the last": lambda w: functional.linear(X, w[-1]),
    "many axes": lambda w: functional.linear(X.reshape(1, 5, 1, INP), w[0]),
    "matmul": lambda w: X @ w[1].T,
    "matmul of a stack": lambda w: torch.matmul(BATCH, w.mT),
    "matmul from the left": lambda w: w[0] @ X.T,
    "a vector": lambda w: w[0] @ X[0],
    "a vector from the left": lambda w: BACK[0] @ w[0],
    "mm": lambda w: torch.mm(BACK, w[0]),
    "bmm": lambda w: torch.bmm(BATCH_BACK, w),
    "bmm of some": lambda w: torch.bmm(w[IDS], X[:4].unsqueeze(-1)),
    "bmm of some, turned": lambda w: X[:4].unsqueeze(1).bmm(w[IDS].transpose(1, 2)),
    "iterating": lambda w: torch.stack([X @ each.t() for each in w]),
    "a slice": lambda w: BATCH_BACK[1:] @ w[1:],
    "indexed twice": lambda w: X @ w[1:][0].mT,
    "copies": lambda w: X @ w.contiguous().detach()[1].mT,
    "one of one": lambda w: X @ w[1].reshape(2, OUT // 2, INP)[1].T,
}


class Computed(TorchDispatchMode):
    """Sees the shapes of all that is computed, apart from picking and copying."""

    KINDS = ("add", "mul", "mm", "bmm", "addmm", "baddbmm", "sub", "addcmul")

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__.rstrip("_") in self.KINDS:
            self.shapes.add(tuple(found.shape))
        return found


def is_dense(shapes, *wholes):
    turned = {(*whole[:-2], whole[-1], whole[-2]) for whole in wholes}
    return bool(shapes & (turned | set(wholes)))


@pytest.mark.parametrize("name", WAYS)
def test_products_are_those_of_the_dense_sum_and_none_is_made(name):
    matrix = stack()
    wanted = WAYS[name](sum_of(matrix))

    with Computed() as computed:
        with torch.no_grad():
            found = WAYS[name](matrix)
        again = WAYS[name](matrix)  # where gradients may be asked

    assert computed.shapes
    assert not is_dense(computed.shapes, (OUT, INP), (EXPERTS, OUT, INP))
    assert type(found) is torch.Tensor
    assert torch.allclose(found, wanted)
    assert torch.allclose(again, wanted)


# What is answered by the dense sum, of one expert where that can be.
OTHERS = {
    "einsum": lambda w: torch.einsum("ti,eoi->eto", X, w),
    "arithmetic": lambda w: 2 * w + w / 3,
    "a part of an expert": lambda w: X[:, :2] @ w[1, :, :2].T,
    "parts of experts": lambda w: w[1:, 2:],
    "chunks": lambda w: w[0].chunk(2)[1],
    "a view of all": lambda w: w.view(EXPERTS * OUT, INP),
    "a copy in another dtype": lambda w: w.to(torch.float32).double() - w.float().double(),
    "both sides": lambda w: w.mT @ w,
    "a function": torch.linalg.norm,
    "addmm": lambda w: torch.addmm(BACK, X, w[0].T),
    "a mask": lambda w: w[torch.tensor([True, False, True])].sum(),
}


@pytest.mark.parametrize("name", OTHERS)
def test_whatever_else_is_asked_is_asked_of_the_dense_sum(name):
    matrix = stack()

    assert torch.allclose(OTHERS[name](matrix), OTHERS[name](sum_of(matrix)))


def test_tells_what_it_is_without_its_numbers():
    matrix = stack()

    with Computed() as computed:
        assert matrix.shape == (EXPERTS, OUT, INP)
        assert (matrix.dtype, matrix.dim(), len(matrix)) == (torch.float64, 3, EXPERTS)
        assert matrix.size(-1) == INP
        assert matrix.device.type == "cpu"

    assert not computed.shapes


@pytest.mark.parametrize("is_turned", [False, True])
def test_grouped_products_meet_each_row_with_its_expert(is_turned):
    matrix = stack(torch.float32)
    wanted = sum_of(matrix)
    x = (BACK if is_turned else X).float()
    turned = matrix if is_turned else matrix.transpose(-2, -1)
    whole = wanted if is_turned else wanted.mT

    found = functional.grouped_mm(x, turned, offs=OFFS)

    for expert, (start, end) in enumerate([(0, 2), (2, 2), (2, 5)]):
        own = x[start:end].double() @ whole[expert]
        assert (found[start:end] - own).abs().max() <= 1e-5 if end > start else True


ranks = st.lists(st.integers(1, 4), min_size=1, max_size=3)


@settings(max_examples=40)
@given(ranks, st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.data())
def test_we_are_as_exact_as_plain_torch_with_the_dense_sum(ranks, dtype, data):
    weights = [data.draw(st.sampled_from([1.0, 0.3, -2.0])) for _ in ranks]
    matrix = stack(dtype, ranks=ranks, weights=weights)
    x = X.to(dtype)
    exact = x.double() @ sum_of(matrix).mT

    found = torch.stack([functional.linear(x, each) for each in matrix])

    plain = torch.stack([functional.linear(x, each.to(dtype)) for each in sum_of(matrix)])
    floor = torch.finfo(dtype).eps * exact.norm()
    assert (found - exact).norm() <= 2 * (plain - exact).norm() + floor


def test_wide_factors_count_with_all_their_digits():
    torch.manual_seed(0)
    own = torch.zeros(1, OUT, INP).bfloat16()
    term = Term(1.0, torch.randn(1, 2, OUT), torch.randn(1, 2, INP))
    x = X.bfloat16()

    found = functional.linear(x, changed(own, [term])[0])

    exact = x.double() @ (term.left[0].double().T @ term.right[0].double()).T
    assert torch.equal(found, exact.float().bfloat16())


def test_autocast_casts_the_models_product_and_not_the_factors():
    own = torch.zeros(1, OUT, INP)
    term = Term(1.0, torch.randn(1, 2, OUT), torch.randn(1, 2, INP))

    with torch.autocast("cpu", torch.bfloat16):
        found = functional.linear(X.float(), changed(own, [term])[0])

    exact = X.float().double() @ (term.left[0].double().T @ term.right[0].double()).T
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, exact.float().bfloat16())


def test_gradients_reach_the_input_and_the_models_own_weight():
    matrix = stack()
    own = matrix.form.own.requires_grad_()
    x = X.clone().requires_grad_()

    functional.linear(x, matrix[1]).sum().backward()

    assert torch.allclose(x.grad, sum_of(matrix)[1].sum(0).expand(5, INP))
    assert torch.allclose(own.grad[1], X.sum(0).expand(OUT, INP))


@pytest.mark.parametrize(
    "write",
    [lambda w: w.add_(1), lambda w: w[0].zero_(), lambda w: w.__setitem__(0, 0)],
    ids=["add_", "of one", "setitem"],
)
def test_a_module_that_writes_to_its_weights_is_refused(write):
    with pytest.raises(InputError, match="writes to its weight"):
        write(stack())


MODELS = {
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen2Moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 16,
    },
    "Qwen3Moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
    },
    "GptOss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["full_attention"] * 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "Llama4": {
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 24,
        "interleave_moe_layer_step": 1,
    },
    "Olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "GraniteMoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "DeepseekV3": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 0,
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": None,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "n_shared_experts": 1,
        "num_key_value_heads": 4,
    },
}
WITHOUT_CHOICE = {"Llama4"}  # goes over its experts in one way
WAYS_OF_MODELS = [
    (name, way)
    for name in MODELS
    for way in ("eager", "batched_mm", "grouped_mm")
    if way == "eager" or name not in WITHOUT_CHOICE
]
TOKENS = torch.arange(21).reshape(3, 7)


def model(name, way):
    import transformers

    sizes = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if name not in WITHOUT_CHOICE:
        sizes["experts_implementation"] = way
    text = "Text" if name == "Llama4" else ""
    config = getattr(transformers, f"{name}{text}Config")(**sizes | MODELS[name])
    torch.manual_seed(0)
    made = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.15) if parameter.dim() > 1 else parameter.uniform_(1, 2)
    return made


def experts_of(made):
    return [
        (module, name)
        for module in made.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3
    ]


def adapter(made, seed, rank):
    torch.manual_seed(seed)
    found = {}
    for module, name in experts_of(made):
        shape = getattr(module, name).shape
        is_transposed = getattr(module, "is_transposed", False)
        experts, out, inp = (shape[0], *reversed(shape[1:])) if is_transposed else shape
        a, bt = torch.randn(experts, rank, inp), torch.randn(experts, rank, out)
        found[module, name] = Factors(0.2 * a, 0.2 * bt, layer="experts")
    return Resident(f"r{seed}", f"r{seed}", {}, found)


def with_all_in_it(made, acting, other):
    """Put the changes into the weights of `made`, a copy of the model that was adapted."""
    for (module, name), key in zip(experts_of(made), experts_of(other), strict=True):
        weight = getattr(module, name)
        for one, times in acting:
            own = one.experts[key]
            change = own.bt.double().mT @ own.a.double()
            if getattr(module, "is_transposed", False):
                change = change.mT
            weight.data += (times * change).to(weight.dtype)
    return made


@pytest.mark.parametrize(("name", "way"), WAYS_OF_MODELS)
@torch.no_grad()
def test_models_with_experts_give_the_dense_truth_for_all_rows_and_by_rows(name, way):
    made = model(name, way)
    base = made(TOKENS).logits
    one, two = adapter(made, 1, 3), adapter(made, 2, 5)
    sets = [((one, 1.0),), (), ((one, 0.5), (two, -0.7))]
    now = [Step(for_all(sets[2]), (3, 7))]
    twins = Twins(made, Sites(), lambda: now[0])
    twins.put_on(sets[2])

    with Computed() as computed:
        found = made(TOKENS).logits
        now[0] = Step(by_rows(sets), (3, 7))
        mixed = made(TOKENS).logits
    twins.take_off()

    wholes = {tuple(getattr(*each).shape) for each in experts_of(made)}
    assert not is_dense(computed.shapes, *wholes)
    exact = with_all_in_it(model(name, "eager").double(), sets[2], made)(TOKENS).logits
    plain = with_all_in_it(model(name, way), sets[2], made)(TOKENS).logits
    floor = torch.finfo(torch.float32).eps * exact.norm()
    assert (found - exact).norm() <= 2 * (plain - exact).norm() + floor
    assert (found - base).norm() >= 0.05 * base.norm()
    assert torch.allclose(mixed[1], base[1], atol=1e-5)
    assert torch.allclose(mixed[2], found[2], atol=1e-5)
    first = with_all_in_it(model(name, way), sets[0], made)(TOKENS).logits
    assert torch.allclose(mixed[0], first[0], atol=1e-4)
    assert torch.equal(made(TOKENS).logits, base)


class Router(nn.Module):
    """A module with a matrix of its own, no layer: one expert, as PEFT has it."""

    is_transposed = True  # of experts; a matrix of two axes is (out, in) always

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(OUT, INP))

    def forward(self, x):
        return functional.linear(x, self.weight)


def router(**others):
    module = Router()
    factors = Factors(
        torch.randn(1, 2, INP), torch.randn(1, 2, OUT), layer="experts", **others
    )
    return module, Resident("one", "one", {}, {(module, "weight"): factors})


def test_a_matrix_of_two_axes_counts_as_one_expert():
    module, one = router()
    twins = Twins(module, Sites(), lambda: Step(for_all(((one, 0.5),))))

    twins.put_on(((one, 0.5),))
    found = module(X.float())

    (factors,) = one.experts.values()
    wanted = module.weight + 0.5 * factors.bt[0].T @ factors.a[0]
    assert torch.allclose(found, X.float() @ wanted.T, atol=1e-5)


def test_refuses_a_weight_that_makes_numbers_too_large():
    module, one = router(largest=1e38)

    with pytest.raises(ComposeError, match="not finite") as error:
        Twins(module, Sites(), lambda: Step(for_all(()))).put_on(((one, 100.0),))

    assert error.value.where == "weight"


def test_refuses_what_is_not_known_to_act_on_experts():
    module, one = router(p=torch.ones(OUT))

    with pytest.raises(FitError, match="more than factors"):
        Twins(module, Sites(), lambda: Step(for_all(()))).put_on(((one, 1.0),))


def test_refuses_experts_whose_weights_another_module_reads():
    module, one = router()
    module.__class__ = type("DbrxExpertGLU", (Router,), {})

    with pytest.raises(FitError, match="read by another module"):
        Twins(module, Sites(), lambda: Step(for_all(()))).put_on(((one, 1.0),))


@pytest.mark.parametrize("way", ["eager", "grouped_mm"])
@torch.no_grad()
def test_what_it_costs_is_factors_and_activations(way):
    """I-19: no more memory beyond what the model itself takes than a few activations."""
    from torch.profiler import ProfilerActivity, profile

    made = model("Mixtral", way)
    one = adapter(made, 1, 2)
    weight = getattr(*experts_of(made)[0])

    def peak():
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            made(TOKENS[:1, :4])
        now = most = 0
        for event in seen.profiler.kineto_results.events():
            if event.name() == "[memory]":
                now += event.nbytes()
                most = max(most, now)
        return most

    plain = peak()
    twins = Twins(made, Sites(), lambda: Step(for_all(((one, 1.0),))))
    twins.put_on(((one, 1.0),))

    assert peak() - plain < weight.nbytes / 2
