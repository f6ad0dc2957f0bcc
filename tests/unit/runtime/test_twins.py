"""Modules that run with other tensors: for all rows, by rows, in threads, or not."""

import copy
import functools
import subprocess
import sys
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lora_hub.adapter.adapter import Replaced
from lora_hub.errors import ComposeError, FitError, InputError
from lora_hub.runtime.resident import Factors, Resident
from lora_hub.runtime.route import BARE, by_rows, for_all
from lora_hub.runtime.sites import Sites
from lora_hub.runtime.step import Step
from lora_hub.runtime.twins import Twins

ROWS, TOKENS, SIZE, WORDS = 4, 3, 5, 7
IDS = torch.arange(ROWS * TOKENS).reshape(ROWS, TOKENS) % WORDS


class Model(nn.Module):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__()
        self.embed = nn.Embedding(WORDS, SIZE)
        self.norm = nn.LayerNorm(SIZE)
        self.head = nn.Linear(SIZE, WORDS)

    def forward(self, ids):
        return self.head(self.norm(self.embed(ids)))


class Now(threading.local):
    """What acts, as a host tells it: in each thread something else."""

    step = Step(BARE)


class Running:
    """A model with twins, and what acts on it."""

    def __init__(self, model=None):
        self.model = model or Model()
        self.sites = Sites(self.model)
        self.now = Now()
        self.twins = Twins(self.model, self.sites, lambda: self.now.step)

    def acts(self, *acting):
        self.twins.put_on(acting)
        self.now.step = Step(for_all(acting), (ROWS, TOKENS))

    def rows(self, *sets, shape=(ROWS, TOKENS)):
        for each in sets:
            self.twins.put_on(each)
        self.now.step = Step(by_rows(sets), shape)


@pytest.fixture
def running():
    return Running()


def new(model, name, seed=1, rows=None):
    torch.manual_seed(seed)
    path, _, last = name.rpartition(".")
    module = model.get_submodule(path)
    shape = getattr(module, last).shape
    size = shape if rows is None else (len(rows), *shape[1:])
    return (module, last), Replaced(torch.randn(size), "modules_to_save", rows)


def resident(model, *names, key="one", seed=1, at=None, rows=None):
    replaced = dict(new(model, name, seed, rows) for name in names)
    return Resident(key, key, at or {}, replaced=replaced)


def truth(acting, build=Model):
    """Return a model in which each adapter has put its tensors in, weighted.

    Summed in float64, so that an adapter alone with weight 1 is there bit for bit.
    """
    model = build()
    own = {name: tensor.double() for name, tensor in model.state_dict().items()}
    total = dict(own)
    for one, weight in acting:
        for (module, last), replaced in one.replaced.items():
            name = f"{_kind(module)}.{last}"
            its = own[name].clone()
            its[slice(None) if replaced.rows is None else list(replaced.rows)] = (
                replaced.tensor.double()
            )
            total[name] = total[name] + weight * (its - own[name])
    model.load_state_dict(total)
    return model


def _kind(module):
    kinds = {nn.Embedding: "embed", nn.LayerNorm: "norm", nn.Linear: "head"}
    return kinds[type(module)]


def test_all_rows_see_the_new_tensors_and_the_model_is_what_it_was(running):
    model = running.model
    before = {path: dict(each.__dict__) for path, each in model.named_modules()}
    bits = copy.deepcopy(model.state_dict())
    one = resident(model, "embed.weight", "norm.weight", "head.bias")

    running.acts((one, 1.0))

    assert torch.equal(model(IDS), truth([(one, 1.0)])(IDS))
    assert all(torch.equal(each, bits[name]) for name, each in model.state_dict().items())
    running.twins.take_off()
    assert not running.twins
    assert torch.equal(model(IDS), Model()(IDS))
    for path, each in model.named_modules():
        assert each.__dict__ == before[path]


def test_a_step_in_which_nothing_acts_is_the_base(running):
    running.acts((resident(running.model, "head.weight"), 1.0))

    running.now.step = Step(BARE)

    assert torch.equal(running.model(IDS), Model()(IDS))


def test_only_modules_that_need_it_run_otherwise(running):
    running.acts((resident(running.model, "head.weight"), 1.0))

    found = [
        name for name, each in running.model.named_modules() if "forward" in vars(each)
    ]

    assert found == ["head"]


def test_says_whether_a_module_is_new(running):
    one, two = (resident(running.model, name) for name in ("head.weight", "norm.bias"))

    assert running.twins.put_on(((one, 1.0),))
    assert not running.twins.put_on(((one, 0.5),))
    assert running.twins.put_on(((one, 1.0), (two, 1.0)))
    running.twins.take_off()
    assert running.twins.put_on(((one, 1.0),))


def adapters(model):
    return [
        resident(model, "embed.weight", key="rows", seed=1, rows=(2, 5)),
        resident(model, "embed.weight", "head.weight", "head.bias", key="ends", seed=2),
        resident(model, "norm.weight", key="norm", seed=3),
    ]


one_set = st.dictionaries(
    st.integers(0, 2), st.sampled_from([1.0, 0.5, -2.0]), max_size=3
).map(lambda found: tuple(sorted(found.items())))


@settings(max_examples=50)
@given(st.lists(one_set, min_size=ROWS, max_size=ROWS), st.booleans())
def test_each_row_of_a_batch_is_as_alone(chosen, is_flat):
    running = Running()
    known = adapters(running.model)
    sets = [tuple((known[index], weight) for index, weight in one) for one in chosen]

    running.rows(*sets)
    ids = IDS.reshape(-1) if is_flat else IDS
    found = running.model(ids).reshape(ROWS, TOKENS, WORDS)

    for row, acting in enumerate(sets):
        wanted = truth(acting)(IDS[row : row + 1])[0]
        assert torch.allclose(found[row], wanted, atol=1e-4, rtol=1e-4)
        if not acting:
            assert torch.allclose(found[row], wanted, atol=1e-6)


def test_rows_go_through_once_for_each_set_that_the_module_knows(running):
    seen = []

    class Head(nn.Linear):
        def forward(self, x):
            seen.append(len(x))
            return super().forward(x)

    running = Running()
    running.model.head = Head(SIZE, WORDS)
    one = resident(running.model, "head.weight")
    other = resident(running.model, "norm.weight", key="two")

    running.rows(((one, 1.0),), ((other, 1.0),), ((one, 1.0), (other, 1.0)), ())
    running.model(IDS)

    assert seen == [2, 2]


def test_a_module_whose_input_does_not_tell_rows_is_refused(running):
    one = resident(running.model, "norm.weight")
    running.rows(((one, 1.0),), (), ((one, 1.0),), ())

    with pytest.raises(InputError, match="does not tell the 4 rows") as error:
        running.model.norm(torch.ones(5, TOKENS, SIZE))

    assert error.value.where == "norm"


def test_what_is_given_and_what_comes_back_is_taken_apart_and_put_together():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(SIZE))

        def forward(self, x, pair, *, mask, scale):
            first, second = pair
            return (x * self.weight * mask + first * scale, [second, None])

    model = nn.Sequential(Two())
    running = Running(model)
    key = (model[0], "weight")
    its = Replaced(torch.full((SIZE,), 3.0), "modules_to_save")
    one = Resident("one", "one", {}, replaced={key: its})
    x = torch.randn(ROWS, TOKENS, SIZE)
    pair = (torch.randn(ROWS, 1, SIZE), torch.randn(ROWS, 2))
    mask, scale = torch.randn(ROWS, 1, 1), torch.randn(SIZE)
    plain, _ = model[0](x, pair, mask=mask, scale=scale)

    running.rows(((one, 1.0),), (), ((one, 1.0),), ())
    found, (second, nothing) = model[0](x, pair, mask=mask, scale=scale)

    wanted = plain.clone()
    wanted[[0, 2]] += (2 * x * mask)[[0, 2]]
    assert torch.allclose(found, wanted, atol=1e-6)
    assert torch.equal(second, pair[1])
    assert nothing is None


def test_an_output_that_cannot_be_put_together_is_refused(running):
    class Counting(nn.LayerNorm):
        def forward(self, x):
            return {"found": super().forward(x)}

    model = nn.Sequential(Counting(SIZE))
    running = Running(model)
    one = resident(model, "0.weight")
    running.rows(((one, 1.0),), (), (), ())

    with pytest.raises(InputError, match="gives a dict that cannot be put together"):
        model(torch.ones(ROWS, SIZE))


def test_gradients_reach_each_rows_input(running):
    one = resident(running.model, "head.weight")
    x = torch.randn(ROWS, TOKENS, SIZE, requires_grad=True)
    running.rows((), ((one, 1.0),), (), ((one, 1.0),))

    running.model.head(x).sum().backward()

    (its,) = one.replaced.values()
    base = running.model.head.weight.detach().sum(0)
    for row in range(ROWS):
        wanted = its.tensor.sum(0) if row % 2 else base
        assert torch.allclose(x.grad[row], wanted.expand(TOKENS, SIZE))


def test_two_threads_see_each_its_own_at_the_same_time():
    class Waiting(nn.Linear):
        def forward(self, x):
            meet.wait(10)
            found = super().forward(x)
            meet.wait(10)
            return found

    meet = threading.Barrier(2)
    running = Running(nn.Sequential(Waiting(SIZE, WORDS)))
    sets = [
        ((resident(running.model, "0.weight", key=str(seed), seed=seed), 1.0),)
        for seed in (1, 2)
    ]
    x, found = torch.randn(ROWS, SIZE), {}

    def work(index):
        running.acts(*sets[index])
        found[index] = running.model(x)

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()

    layer = running.model[0]
    for index, acting in enumerate(sets):
        (its,) = acting[0][0].replaced.values()
        assert torch.equal(found[index], nn.functional.linear(x, its.tensor, layer.bias))


def test_the_layers_own_scaling_is_told_not_to_be_added(running):
    sites, head = running.sites, running.model.head
    p, factors = torch.randn(WORDS), torch.zeros(0, SIZE)
    at = {sites.number(head): Factors(factors, torch.zeros(0, WORDS), p=p, largest=9.0)}
    one = resident(running.model, "head.weight", at=at)
    other = resident(running.model, "norm.weight", key="two")

    running.acts((one, 0.5))

    (its,) = one.replaced.values()
    own = head.weight.detach()
    wanted = own + 0.5 * (its.tensor * (1 + p[:, None]) - own)
    x = torch.randn(2, SIZE)
    assert torch.allclose(head(x), nn.functional.linear(x, wanted, head.bias), atol=1e-5)
    assert running.twins.dropped(((one, 0.5),)) == {sites.number(head): {"p", "q"}}
    assert running.twins.dropped(((other, 1.0),)) == {}


def test_a_deep_copy_runs_with_its_own_parameters(running):
    running.acts((resident(running.model, "embed.weight", rows=(2,)), 1.0))

    twin = copy.deepcopy(running.model)
    with torch.no_grad():
        running.model.head.weight.zero_()
        running.model.embed.weight.zero_()

    again = Running()
    again.acts((resident(again.model, "embed.weight", rows=(2,)), 1.0))
    assert torch.equal(twin(IDS), again.model(IDS))


def test_on_an_error_nothing_is_changed(running):
    one = resident(running.model, "norm.weight", "head.weight")
    running.model.head.forward = running.model.norm.forward

    with pytest.raises(FitError, match="another tool") as error:
        running.twins.put_on(((one, 1.0),))

    assert error.value.where == "head"
    assert not running.twins
    assert "forward" not in vars(running.model.norm)


def wrapped(module):
    """Put a forward on a module as tools do that know nothing of us."""
    own = module.forward

    @functools.wraps(own)
    def forward(*args):
        return 2 * own(*args)

    module.forward = forward


def test_a_tool_that_wraps_the_module_later_stays_and_ours_sleeps_inside(running):
    one = resident(running.model, "norm.weight")
    running.acts((one, 1.0))
    head, norm = running.model.head, running.model.norm
    wrapped(norm)
    x = torch.randn(2, SIZE)
    with_it = norm(x)

    running.twins.take_off()
    assert torch.equal(norm(x), 2 * Model().norm(x))
    assert not running.twins
    running.twins.put_on(((one, 1.0),))

    assert torch.equal(norm(x), with_it)
    assert torch.equal(with_it, 2 * truth([(one, 1.0)]).norm(x))
    assert "forward" not in vars(head)


@pytest.mark.parametrize("is_first", [True, False])
def test_a_hook_of_accelerate_goes_on_to_bring_its_weights(running, is_first):
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    class Bringing(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            module.weight.data.copy_(kept)
            return args, kwargs

        def post_forward(self, module, output):
            module.weight.data.zero_()
            return output

    model, one = running.model, resident(running.model, "norm.weight", rows=(0, 3))
    wanted, kept = truth([(one, 1.0)]).norm, model.norm.weight.detach().clone()
    x = torch.randn(2, SIZE)
    if is_first:
        add_hook_to_module(model.norm, Bringing())
    running.acts((one, 1.0))
    if not is_first:
        add_hook_to_module(model.norm, Bringing())

    assert torch.equal(model.norm(x), wanted(x))
    running.now.step = Step(BARE)
    assert torch.equal(model.norm(x), Model().norm(x))
    running.twins.take_off()
    assert torch.equal(model.norm(x), Model().norm(x))
    remove_hook_from_module(model.norm)
    model.norm.weight.data.copy_(kept)
    assert torch.equal(model.norm(x), Model().norm(x))


def test_numbers_that_are_not_finite_are_refused_by_the_tensors_name(running):
    (key, replaced) = new(running.model, "head.bias")
    replaced.tensor[2] = torch.inf
    one = Resident("one", "one", {}, replaced={key: replaced})

    with pytest.raises(ComposeError, match="not finite") as error:
        running.twins.put_on(((one, 1.0),))

    assert error.value.where == "head.bias"


def quantised():
    module = nn.Module()
    module.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
    module.forward = lambda x: x
    return nn.Sequential(module)


def test_numbers_are_not_put_into_a_weight_that_holds_codes():
    model = quantised()
    its = Replaced(torch.randn(2, 2), "modules_to_save")
    one = Resident("one", "one", {}, replaced={(model[0], "weight"): its})
    del model[0].forward

    with pytest.raises(FitError, match=r"held in torch.int8 and the adapter's in"):
        Running(model).twins.put_on(((one, 1.0),))


def test_an_alora_beside_a_replaced_weight_that_it_scales_is_refused(running):
    number = running.sites.number(running.model.head)
    its = Factors(torch.zeros(0, SIZE), torch.zeros(0, WORDS), p=torch.ones(WORDS))
    waiting = Resident("two", "two", {number: its}, tokens=(1, 2))
    one = resident(running.model, "head.weight")

    with pytest.raises(FitError, match="acts from its invocation tokens on"):
        running.twins.put_on(((one, 1.0), (waiting, 1.0)))


COMPILED = """
import sys
import torch
from lora_hub.adapter.adapter import Replaced
from lora_hub.runtime.resident import Resident
from lora_hub.runtime.route import BARE, by_rows, for_all
from lora_hub.runtime.sites import Sites
from lora_hub.runtime.step import Step
from lora_hub.runtime.twins import Twins

assert "torch._dynamo" not in sys.modules  # half of torch, which few need
model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 2))
new = Replaced(torch.full((3, 3), 0.5), "modules_to_save")
one = Resident("a", "a", {}, replaced={(model[0], "weight"): new})
now = [Step(BARE)]
twins, x = Twins(model, Sites(), lambda: now[0]), torch.ones(2, 3)
steps = [Step(BARE), Step(for_all(((one, 1.0),))), Step(by_rows([((one, 1.0),), ()]))]
twins.put_on(((one, 1.0),))

def run(call):
    found = []
    for step in steps:
        now[0] = step
        found.append(call(x))
    return found

plain = run(model)
compiled = torch.compile(model, backend="eager")
after = run(compiled) + run(compiled)
print([torch.equal(a, b) for a, b in zip(after, plain * 2)], torch.equal(*plain[:2]))
"""


def test_compiled_code_follows_what_acts():
    # In a process of its own: the checks of shapes in tests cannot be compiled.
    found = subprocess.run(
        [sys.executable, "-c", COMPILED], capture_output=True, text=True, check=False
    )

    assert found.stdout.strip() == f"{[True] * 6} False", found.stderr
