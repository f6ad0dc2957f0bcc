"""A swapped parameter is another one inside of a forward, and itself everywhere else."""

import subprocess
import sys
import threading

import pytest
import torch
from torch import nn

from lora_hub.adapter.adapter import Replaced
from lora_hub.adapter.update import Update
from lora_hub.errors import InputError
from lora_hub.runtime.layers import Place
from lora_hub.runtime.swap import Part, Swap

OUT, INP = 4, 3


class Layer(nn.Linear):
    """A layer that says what it sees, and fails or calls itself when asked."""

    def __init__(self):
        super().__init__(INP, OUT)
        self.seen = []

    def forward(self, x, depth=0, fails=False):
        self.seen.append(self.weight.detach().clone())
        if depth:
            self(x, depth - 1, fails)
            self.seen.append(self.weight.detach().clone())
        if fails:
            raise ZeroDivisionError
        return super().forward(x)


def replaced(seed=1, rows=None, dtype=torch.float32):
    torch.manual_seed(seed)
    size = OUT if rows is None else len(rows)
    return Replaced(torch.randn(size, INP).to(dtype), "modules_to_save", rows)


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return Layer()


def hooked(layer, *parts):
    swap = Swap(Place(layer), parts)
    layer.register_forward_pre_hook(swap.before, prepend=True)
    layer.register_forward_hook(swap.after, always_call=True)
    return swap


def test_the_module_sees_the_new_tensor_and_holds_its_own(layer):
    own, bits = layer.weight, layer.weight.detach().clone()
    new = replaced()
    hooked(layer, Part(1.0, new))

    layer(torch.ones(2, INP))

    assert torch.equal(layer.seen[0], new.tensor)
    assert layer.weight is own
    assert torch.equal(layer.state_dict()["weight"], bits)


@pytest.mark.parametrize("depth", [0, 2])
def test_the_parameter_is_back_after_a_forward_that_fails(layer, depth):
    own = layer.weight
    hooked(layer, Part(1.0, replaced()))

    with pytest.raises(ZeroDivisionError):
        layer(torch.ones(2, INP), depth, fails=True)

    assert layer.weight is own


def test_a_forward_inside_a_forward_and_a_second_one_see_the_same(layer):
    own, new = layer.weight, replaced()
    hooked(layer, Part(1.0, new))

    layer(torch.ones(2, INP), depth=2)
    layer(torch.ones(2, INP))

    assert len(layer.seen) == 6
    assert all(torch.equal(each, new.tensor) for each in layer.seen)
    assert layer.weight is own


def test_what_an_interrupt_left_is_put_back(layer):
    own = layer.weight
    swap = hooked(layer, Part(1.0, replaced()))

    swap.before(layer, ())  # and nothing is called after it
    swap.restore()

    assert layer.weight is own


def test_rows_take_the_place_of_rows(layer):
    new = replaced(rows=(2, 0))
    hooked(layer, Part(1.0, new))

    layer(torch.ones(2, INP))

    own = layer.weight.detach()
    assert torch.equal(
        layer.seen[0], torch.stack([new.tensor[1], own[1], new.tensor[0], own[3]])
    )


def test_weights_count_the_difference_to_the_base(layer):
    one, two = replaced(1), replaced(2, rows=(1, 3))
    hooked(layer, Part(0.5, one), Part(-2.0, two))

    layer(torch.ones(2, INP))

    own = layer.weight.detach().double()
    wanted = own + 0.5 * (one.tensor.double() - own)
    wanted[[1, 3]] += -2.0 * (two.tensor.double() - own[[1, 3]])
    assert (layer.seen[0] - wanted).abs().max() <= 1e-6


def test_rows_of_two_adapters_that_do_not_meet_keep_their_bits(layer):
    one, two = replaced(1, rows=(0,)), replaced(2, rows=(3,))
    hooked(layer, Part(1.0, one), Part(1.0, two))

    layer(torch.ones(2, INP))

    assert torch.equal(layer.seen[0][0], one.tensor[0])
    assert torch.equal(layer.seen[0][3], two.tensor[0])
    assert torch.equal(layer.seen[0][1:3], layer.weight[1:3])


def test_scales_act_on_what_their_own_adapter_replaces(layer):
    new, p = replaced(), torch.randn(OUT).double()
    scales = Update(torch.zeros(0, INP), torch.zeros(OUT, 0), torch.zeros(0).double(), p=p)
    hooked(layer, Part(0.5, new, scales), Part(2.0, scales=scales))

    layer(torch.ones(2, INP))

    own, its = layer.weight.detach().double(), new.tensor.double()
    wanted = own + 0.5 * (its - own + p[:, None] * its) + 2.0 * p[:, None] * own
    assert (layer.seen[0] - wanted).abs().max() <= 1e-6


def test_takes_the_dtype_of_the_parameter(layer):
    layer.bfloat16()
    hooked(layer, Part(1.0, replaced()))

    layer(torch.ones(2, INP).bfloat16())

    assert torch.equal(layer.seen[0], replaced().tensor.bfloat16())


def test_follows_a_parameter_that_is_changed_in_place(layer):
    new = replaced(rows=(0,))
    hooked(layer, Part(1.0, new))
    layer(torch.ones(2, INP))

    with torch.no_grad():
        layer.weight.fill_(7)
    layer(torch.ones(2, INP))

    assert torch.equal(layer.seen[1][1:], torch.full((OUT - 1, INP), 7.0))
    assert torch.equal(layer.seen[1][0], new.tensor[0])


def test_gradients_reach_the_input_and_what_stays_of_the_experts():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Parameter(torch.randn(2, OUT, INP))

        def forward(self, x):
            return x @ self.up.mT

    experts = Experts()
    update = Update(
        torch.randn(2, 1, INP),
        torch.randn(2, OUT, 1),
        torch.ones(1).double(),
        layer="experts",
    )
    swap = Swap(Place(experts, "up"), terms=[(update, 0.5)])
    experts.register_forward_pre_hook(swap.before)
    experts.register_forward_hook(swap.after, always_call=True)
    x = torch.randn(2, 5, INP, requires_grad=True)

    found = experts(x)
    found.sum().backward()

    wanted = x @ (experts.up + 0.5 * update.b @ update.a).mT
    assert torch.allclose(found, wanted, atol=1e-5)
    assert x.grad is not None
    assert experts.up.grad is not None


def test_a_second_thread_in_the_same_module_is_refused_and_the_first_goes_on(layer):
    own, new = layer.weight, replaced()
    hooked(layer, Part(1.0, new))
    inside, done = threading.Event(), threading.Event()
    found = []

    def wait(*_):
        inside.set()
        done.wait(10)

    kept = layer.register_forward_pre_hook(wait)
    first = threading.Thread(target=lambda: found.append(layer(torch.ones(2, INP))))
    first.start()
    inside.wait(10)
    with pytest.raises(InputError, match="two threads at once"):
        layer(torch.ones(2, INP))
    done.set()
    first.join()
    kept.remove()

    assert torch.equal(layer.seen[0], new.tensor)
    assert torch.equal(found[0], layer(torch.ones(2, INP)))
    assert layer.weight is own


def test_what_was_made_in_inference_mode_can_be_used_in_training(layer):
    with torch.inference_mode():
        hooked(layer, Part(1.0, replaced()))
        layer(torch.ones(2, INP))

    x = torch.ones(2, INP, requires_grad=True)
    layer(x).sum().backward()

    assert torch.equal(x.grad[0], replaced().tensor.sum(0))


COMPILED = """
import sys
import torch
from lora_hub.adapter.adapter import Adapter, Replaced
from lora_hub.runtime.host import Host

assert "torch._dynamo" not in sys.modules  # half of torch, which few need
model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 2))
new = Replaced(torch.full((3, 3), 0.5), "modules_to_save")
host, x = Host(model), torch.ones(2, 3)
host.load(Adapter(updates={}, replaced={"0.weight": new}, name="a/b"))
base = model(x)
host.use("a/b")
used = model(x)
compiled = torch.compile(model, backend="eager")
after = [compiled(x), compiled(x)]
host.use(None)
bare = compiled(x)
host.use("a/b")
after.append(compiled(x))
print(all(torch.equal(each, used) for each in after), torch.equal(bare, base))
"""


def test_a_compiled_forward_sees_the_new_tensor():
    # In a process of its own: the checks of shapes in tests cannot be compiled.
    found = subprocess.run(
        [sys.executable, "-c", COMPILED], capture_output=True, text=True, check=False
    )

    assert found.stdout.split() == ["True", "True"], found.stderr


def test_columns_of_a_grouped_convolution_are_scaled_by_its_channels():
    """With as many columns in a row of the weight as there are channels in all groups."""
    torch.manual_seed(0)
    conv = nn.Conv1d(4, 6, 2, groups=2)
    new = Replaced(torch.randn(6, 2, 2), "modules_to_save")
    q = torch.tensor([0.5, -0.25, 2.0, 1.0], dtype=torch.float64)
    scales = Update(
        torch.zeros(0, 4), torch.zeros(0, 0), torch.zeros(0).double(), q=q, layer="conv"
    )
    seen = []
    conv.register_forward_hook(lambda *_: seen.append(conv.weight.detach().clone()))
    hooked(conv, Part(1.0, new, scales))

    conv(torch.ones(1, 4, 5))

    factors = (1 + q).float().reshape(2, 1, 2, 1)  # groups, rows, channels of the group
    wanted = (new.tensor.reshape(2, 3, 2, 2) * factors).reshape(6, 2, 2)
    assert torch.allclose(seen[0], wanted)
