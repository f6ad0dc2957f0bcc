"""What adapters cost on a live model, counted and not timed: I-19, I-21 and I-22.

Operations, floating-point operations, bytes of what is made, and calls of functions are the
same on every machine; how long they take is a matter of `benchmarks/runtime.py`.
"""

import sys
from math import prod

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import lora_hub
from lora_hub.adapter.adapter import Adapter
from lora_hub.adapter.update import Update
from tests import nets, peft_zoo


def product(_, a, b, **_more):
    """Return the operations of a product from the shapes of what is multiplied."""
    return 2 * prod(a) * b[-1]


# torch counts the products that make a tensor, and not those that add to one.
IN_PLACE = dict.fromkeys((torch.ops.aten.addmm_, torch.ops.aten.baddbmm_), product)


def words(**adapters):
    """Return a net and a host with adapters, name → rank."""
    found = nets.net(nets.Words)
    host = lora_hub.attach(found)
    for name, rank in adapters.items():
        host.load(nets.adapter(found, rank, 10 * rank), as_=name)
    return found, host


class Made(TorchDispatchMode):
    """What torch makes: how many operations run, and the largest tensor they allocate."""

    def __init__(self):
        super().__init__()
        self.operations, self.largest_bytes = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        given = {where(each) for each in tree_leaves((args, kwargs)) if is_tensor(each)}
        self.operations += 1
        for each in tree_leaves(result):
            if is_tensor(each) and where(each) not in given:  # a view makes nothing
                size = each.untyped_storage().nbytes()
                self.largest_bytes = max(self.largest_bytes, size)
        return result


def is_tensor(value):
    return isinstance(value, torch.Tensor)


def where(tensor):
    return tensor.untyped_storage().data_ptr()


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_i_19_experts_never_have_a_dense_change(kind, rows):
    model = getattr(peft_zoo, kind)().eval()
    paths = [name for name, _ in model.named_parameters() if name.endswith("_proj")]
    updates = {}
    for seed, path in enumerate(sorted(paths)):
        weight = model.get_parameter(path)
        turned = kind == "gpt_oss"
        experts, out, inp = weight.mT.shape if turned else weight.shape
        generator = torch.Generator().manual_seed(seed)
        updates[path] = Update(
            a=torch.randn(experts, 2, inp, generator=generator),
            b=torch.randn(experts, out, 2, generator=generator),
            scaling=torch.full((2,), 0.1, dtype=torch.float64),
            layer="experts",
        )
    assert updates
    host = lora_hub.attach(model)
    host.load(Adapter(updates), as_="one")
    tokens = torch.arange(4).reshape(2, 2)
    smallest = min(model.get_parameter(path)[0].nbytes for path in updates)

    with torch.no_grad(), Made() as bare:
        model(tokens)
    using = host.rows(["one", None]) if rows else host.using("one")
    with torch.no_grad(), using, Made() as made:
        model(tokens)

    # Of one expert, or of all: no tensor is made that the bare model does not make as well.
    assert made.largest_bytes <= max(bare.largest_bytes, smallest - 1)


def test_i_21_rows_without_an_adapter_cost_no_operation():
    found, host = words(one=2)
    x = found.batch(4)

    def operations(entries):
        with torch.no_grad(), Made() as made:
            if entries is None:
                found(x)
            else:
                with host.rows(entries):
                    found(x)
        return made.operations

    assert operations([None] * 4) == operations(None)
    assert operations([{"one": 0.0}] * 4) == operations(None)


def test_i_21_the_cost_is_that_of_the_true_ranks_and_rows():
    found, host = words(small=1, large=30)
    x = found.batch(6)
    linear = ("q_proj", "k_proj", "v_proj", "mix", "head")
    sides = sum(sum(nets.matrix(getattr(found, each)).shape) for each in linear)
    sides += nets.HIDDEN  # of the embedding, whose `a` is looked up

    def flops(entries):
        counter = FlopCounterMode(display=False, custom_mapping=IN_PLACE)
        with torch.no_grad(), counter, host.rows(entries):
            found(x)
        return counter.get_total_flops()

    bare = flops([None] * 6)

    def added(ranks):
        return 2 * nets.TOKENS * sum(ranks) * sides

    assert flops(["small"] * 6) - bare == added([1] * 6)
    assert flops(["large", *[None] * 5]) - bare == added([30])
    assert flops(["small", "large", None, "small", None, None]) - bare == added([1, 30, 1])


@pytest.mark.parametrize("what", ["use", "rows", "load", "swap"])
def test_i_22_no_step_grows_with_the_number_of_loaded_adapters(what):
    def calls(loaded):
        found = nets.net(nets.Words)
        host = lora_hub.attach(found)
        for index in range(loaded):
            host.load(nets.adapter(found, 2, index), as_=f"a{index}")
        new = nets.adapter(found, 2, 999)
        steps = {
            "use": lambda: host.use({"a0": 0.5, "a1": 2.0}),
            "rows": lambda: host.rows(["a0", None]).__enter__(),
            "load": lambda: host.load(new, as_="new"),
            "swap": lambda: host.swap("a1", new),
        }
        steps["use"]()
        host.use(None)
        count = 0

        def tick(_frame, event, _arg):
            nonlocal count
            count += event == "call"

        sys.setprofile(tick)
        try:
            steps[what]()
        finally:
            sys.setprofile(None)
        return count

    few, many = calls(3), calls(60)

    assert many <= 1.05 * few + 5
