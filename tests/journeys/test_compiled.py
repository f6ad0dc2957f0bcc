"""`torch.compile`: using, routing and swapping adapters compile nothing again.

How often torch compiles is counted by a backend of torch's own that hands the graph back.
"""

import itertools
import random
import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import lora_hub
from lora_hub.adapter.adapter import Adapter, Replaced
from tests import nets

ROWS = 3
NAMES = ("one", "two", "three")
LINEAR = ("q_proj", "k_proj", "v_proj", "head")


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def random_adapter(found, turn):
    """Return an adapter of mixed rank and targets, another one each turn."""
    chosen = random.Random(turn).sample(LINEAR, 1 + turn % len(LINEAR))
    ranks = {target: 1 + (turn + at) % 7 for at, target in enumerate(sorted(chosen))}
    parts = (("magnitude",), (), ("p", "bias_scale"))[turn % 3]
    return nets.adapter(found, ranks, 50 * turn, parts=parts)


@pytest.fixture
def attached():
    found = nets.net(nets.Words)
    for parameter in found.parameters():
        parameter.requires_grad_(requires_grad=False)
    host = lora_hub.attach(found)
    # All sites are met at first, so that none is new afterwards.
    host.load(nets.adapter(found, dict.fromkeys(LINEAR, 2), 9), as_="whole")
    for turn, name in enumerate(NAMES):
        host.load(random_adapter(found, turn), as_=name)
    host.use("whole")
    return found, host


def check(found, compiled, host, *, entries=None):
    """Compare compiled with eager, which other tests compare with the truth."""
    x = found.batch(ROWS)
    with torch.no_grad():
        wanted, answer = found(x), compiled(x)
    # The same kernels in the same order; a backend that fuses none.
    assert torch.allclose(answer, wanted, rtol=1e-6, atol=1e-6)
    return answer


def test_a_hundred_swaps_of_mixed_ranks_and_targets_compile_once(attached):
    found, host = attached
    counter = CompileCounter()
    compiled = torch.compile(found, backend=counter, fullgraph=True)
    answers = []

    for turn in range(100):
        host.swap("one", random_adapter(found, turn))
        host.use({"one": 1.0 - turn / 50})
        answers.append(check(found, compiled, host))

    assert counter.frame_count == 1
    assert not any(torch.equal(*pair) for pair in itertools.pairwise(answers))


def test_using_others_and_none_and_rows_compiles_once(attached):
    found, host = attached
    counter = CompileCounter()
    compiled = torch.compile(found, backend=counter, fullgraph=True)
    x = found.batch(ROWS)

    for what in ("one", {"two": -0.5, "three": 2.0}, None, "three", {"one": 0.0}, "whole"):
        host.use(what)
        check(found, compiled, host)
        with host.using("two"):
            check(found, compiled, host)
        for entries in (["one", None, "two"], [{"one": 1.5, "three": -1.0}] * 2 + [None]):
            with host.rows(entries):
                check(found, compiled, host)

    host.use(None)
    with torch.no_grad():
        assert torch.equal(compiled(x), found(x))
    assert counter.frame_count == 1


def test_what_was_compiled_before_anything_was_used_sees_what_is_used_later():
    found = nets.net(nets.Words)
    host = lora_hub.attach(found)
    compiled = torch.compile(found, backend=CompileCounter())
    with torch.no_grad():
        bare = compiled(found.batch(ROWS))

    host.load(nets.adapter(found, {"q_proj": 2}, 9), as_="one")
    host.use("one")

    assert not torch.equal(check(found, compiled, host), bare)
    host.use(None)
    assert torch.equal(check(found, compiled, host), bare)


def test_sites_reserved_at_the_start_compile_once():
    found = nets.net(nets.Words)
    host = lora_hub.attach(found, reserve="all-linear")
    counter = CompileCounter()
    compiled = torch.compile(found, backend=counter, fullgraph=True)
    check(found, compiled, host)

    for turn in range(5):
        host.load(random_adapter(found, turn), as_=f"a{turn}")
        host.use(f"a{turn}")
        check(found, compiled, host)

    assert counter.frame_count == 1


def test_adapters_that_replace_tensors_act_on_a_compiled_model_too(attached):
    found, host = attached
    compiled = torch.compile(found, backend=CompileCounter())
    check(found, compiled, host)
    new = torch.randn_like(found.head.bias)
    replaced = Adapter({}, replaced={"head.bias": Replaced(new, role="bias")})

    host.load(replaced, as_="bias")
    host.use("bias")

    x = found.batch(ROWS)
    host_answer = check(found, compiled, host)
    host.use(None)
    with torch.no_grad():
        wanted = found(x) - found.head.bias + new
    assert torch.allclose(host_answer, wanted, atol=1e-5)


def test_a_batch_of_other_rows_is_refused_when_compiled_too(attached):
    found, host = attached
    compiled = torch.compile(found, backend=CompileCounter(), fullgraph=True)
    check(found, compiled, host)

    with host.rows(["one"] * (ROWS + 1)), pytest.raises(lora_hub.LoraHubError):
        compiled(found.batch(ROWS))

    with host.rows(["one"] * ROWS):
        check(found, compiled, host)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch's own backend needs a compiler")
def test_the_default_backend_compiles_once_and_is_right(attached):
    found, host = attached
    compiled = torch.compile(found, fullgraph=True)
    check(found, compiled, host)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]

    for turn in range(20):
        host.swap("one", random_adapter(found, turn))
        with host.rows(["one", None, {"one": -1.0, "two": 0.5}]):
            check(found, compiled, host)

    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before


def two_trained():
    """Return a compiled net, its host, and what two adapters give as the gradient."""
    found = nets.net(nets.Signals)
    host = lora_hub.attach(found)
    for turn, name in enumerate(NAMES[:2]):
        host.load(nets.adapter(found, {"head": 3}, 50 * turn), as_=name)
    wanted = {}
    for name in NAMES[:2]:
        x = found.batch(ROWS).requires_grad_()
        with host.using(name):
            found(x).sum().backward()
        wanted[name] = x.grad
    return found, host, wanted


def test_a_backward_of_compiled_code_is_that_of_its_own_forward():
    found, host, wanted = two_trained()
    compiled = torch.compile(found, backend="aot_eager")
    x, y = found.batch(ROWS).requires_grad_(), found.batch(ROWS).requires_grad_()

    with host.using("one"):
        one = compiled(x).sum()
        with host.using("two"):
            two = compiled(y).sum()
            (one + two).backward()

    assert torch.allclose(x.grad, wanted["one"], atol=1e-6)
    assert torch.allclose(y.grad, wanted["two"], atol=1e-6)


def test_a_backward_of_compiled_code_whose_adapters_are_not_used_is_right_or_refused():
    found, host, wanted = two_trained()
    compiled = torch.compile(found, backend="aot_eager")
    x, y = found.batch(ROWS).requires_grad_(), found.batch(ROWS).requires_grad_()
    host.use("one")
    one = compiled(x).sum()
    host.use("two")
    two = compiled(y).sum()

    try:
        (one + two).backward()
    except lora_hub.LoraHubError as error:
        assert "the forward of compiled code" in str(error)  # noqa: PT017  (either is right)
    else:
        assert torch.allclose(x.grad, wanted["one"], atol=1e-6)
        assert torch.allclose(y.grad, wanted["two"], atol=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch's own backend needs a compiler")
def test_outputs_keep_their_strides_when_compiled():
    torch.manual_seed(0)
    found = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 4, 1)).eval()
    found = found.to(memory_format=torch.channels_last).requires_grad_(requires_grad=False)
    host = lora_hub.attach(found)
    updates = {name: nets.update(getattr(found, name), 2, 1) for name in ("0", "1")}
    host.load(Adapter(updates), as_="one")
    host.use("one")
    x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    wanted = found(x)

    assert torch.allclose(torch.compile(found)(x), wanted, atol=1e-5)
