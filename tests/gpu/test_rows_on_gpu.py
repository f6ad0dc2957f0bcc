"""A host's rows on a GPU: by the kernels, in captured graphs, in compiled models.

`tests/unit/runtime/interpreted.py` holds the same to torch on a CPU; here is what it cannot
show: the compiled kernels, streams, and graphs that replay without Python.
"""

import random
import threading

import pytest
import torch
from torch import nn

import lora_hub
from lora_hub.adapter.adapter import Adapter
from lora_hub.adapter.update import Update
from lora_hub.errors import InputError
from tests.builders import tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator here"),
]

HIDDEN = 64
SITES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def model_on_gpu(dtype="float32"):
    model = tiny_model(hidden=HIDDEN, dtype=dtype)
    return model.to("cuda").requires_grad_(requires_grad=False)


def tokens(rows, length=4):
    return torch.arange(rows * length, device="cuda").view(rows, length) * 5 % 32


def adapter(model, rank, seed, leaves=SITES, **vectors):
    made = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=made) * 0.1

    ones = torch.ones(rank, dtype=torch.float64)
    return Adapter(
        {
            target: Update(
                normal(rank, layer.in_features),
                normal(layer.out_features, rank),
                ones,
                **{name: normal(layer.out_features).double() for name in vectors},
            )
            for target, layer in model.named_modules()
            if isinstance(layer, nn.Linear) and target.rpartition(".")[2] in leaves
        },
        name=str(seed),
    )


def attached(model, kernels="triton", count=4, **options):
    host = lora_hub.attach(model, kernels=kernels, **options)
    for number in range(count):
        host.load(adapter(model, 3 + 9 * number, number), as_=f"n{number}")
    return host


def pair(dtype="float32", **options):
    """Return a model with the kernels' host and an equal one with torch's, the oracle."""
    model, plain = model_on_gpu(dtype), model_on_gpu(dtype)
    return model, attached(model, **options), plain, attached(plain, "torch")


@torch.inference_mode()
def answers(model, x):
    return model(x).logits.clone()


def same(found, wanted):
    """Sums in another order; in half precision with a rounding of each layer's own."""
    eps = torch.finfo(found.dtype).eps
    allowed = (200 if found.dtype == torch.float32 else 16) * eps * wanted.abs().max()
    assert (found.double() - wanted.double()).abs().max() <= allowed


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("length", [1, 4, 60])
def test_rows_are_what_torch_makes_of_them(dtype, length):
    model, host, plain, oracle = pair(dtype)
    entries = ["n0", None, {"n1": 0.5, "n2": -1.0}, "n3", {"n0": 2.0}]

    with host.rows(entries), oracle.rows(entries):
        found = answers(model, tokens(5, length))
        same(found, answers(plain, tokens(5, length)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_among_others_is_what_it_is_alone(dtype):
    model = model_on_gpu(dtype)
    host = attached(model)
    entries = ["n0", None, "n1", {"n2": 0.5, "n3": 2.0}]
    x = tokens(4, 1)

    with host.rows(entries):
        together = answers(model, x)

    for row, entry in enumerate(entries):
        with host.rows([entry]):
            same(together[row : row + 1], answers(model, x[row : row + 1]))


def test_rows_without_an_adapter_are_the_bases_bit_for_bit():
    model = model_on_gpu("bfloat16")
    x = tokens(4)
    bare = answers(model, x)
    host = attached(model)

    with host.rows(["n0", None, "n1", None]):
        found = answers(model, x)

    assert torch.equal(found[1::2], bare[1::2])
    assert not torch.equal(found[::2], bare[::2])


def test_auto_leaves_one_adapter_on_all_rows_to_torch():
    model, plain = model_on_gpu(), model_on_gpu()
    host, oracle = attached(model, "auto"), attached(plain, "torch")

    with host.using("n1"), oracle.using("n1"):
        assert torch.equal(answers(model, tokens(3)), answers(plain, tokens(3)))


def captured(model, x):
    """Return a graph of the model and its output, run once before."""
    with torch.inference_mode():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            model(x, use_cache=False)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(x, use_cache=False).logits
    return graph, out


@pytest.mark.parametrize("length", [1, 4])
def test_a_graph_does_a_hundred_swaps_and_other_rows_and_none(length):
    model, host, plain, oracle = pair("bfloat16")
    x = tokens(4, length)
    with host.rows([None] * 4), host.capturing():
        graph, out = captured(model, x)
    drawn = random.Random(0)
    choices = [None, "n0", "n1", "n2", "n3", {"n0": 0.5, "n2": -1.5}]

    for turn in range(100):
        leaves = drawn.sample(SITES, drawn.randint(1, 7))
        new = adapter(model, drawn.randint(1, 64), 10 + turn, leaves)
        entries = [drawn.choice(choices) for _ in range(4)]
        for each in (host, oracle):
            each.swap("n0", new)
        with host.rows(entries), oracle.rows(entries):
            graph.replay()
            same(out, answers(plain, x))
    graph.replay()
    same(out, answers(plain, x))
    for each in (host, oracle):
        each.use({"n1": 0.5, "n3": 1.0})
    graph.replay()
    same(out, answers(plain, x))
    host.detach()
    oracle.use(None)
    graph.replay()
    same(out, answers(plain, x))


def test_a_graph_reads_adapters_that_left_and_came_back():
    model, plain = model_on_gpu(), model_on_gpu()
    host = attached(model, count=1)
    one = host.memory.used_bytes
    host.detach()
    host, oracle = attached(model, budget=16 * one, count=8), attached(plain, "torch", 8)
    x = tokens(2)
    with host.rows([None, None]), host.capturing():
        graph, out = captured(model, x)

    for turn in range(40):
        entries = [f"n{turn % 8}", f"n{turn * 3 % 8}"]
        with host.rows(entries), oracle.rows(entries):
            graph.replay()
            same(out, answers(plain, x))


def test_a_capture_outside_of_capturing_is_refused():
    model = model_on_gpu()
    host = attached(model)
    x = tokens(2)

    with host.rows(["n0", None]), pytest.raises(InputError, match="whatever is used later"):
        captured_without_a_block(model, x)


def captured_without_a_block(model, x):
    with torch.inference_mode():
        model(x)
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            torch.zeros(1, device="cuda")  # a capture of nothing warns
            model(x, use_cache=False)


def test_what_a_graph_cannot_do_is_refused_by_name():
    model = model_on_gpu()
    host = attached(model)
    host.load(adapter(model, 4, 50, ("q_proj",), p=True), as_="scaled")
    with host.rows([None] * 2), host.capturing():
        captured(model, tokens(2))

    with pytest.raises(InputError, match="scaled"):
        host.use("scaled")


def test_routes_written_on_one_stream_are_read_on_another():
    model, host, plain, oracle = pair()
    x = tokens(3)
    entries = ["n0", None, "n2"]
    with oracle.rows(entries):
        wanted = answers(plain, x)

    with host.rows(entries):
        first = answers(model, x)
        streams = [torch.cuda.Stream() for _ in range(3)]
        found = []
        for stream in streams:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                found.append(answers(model, x))
    torch.cuda.synchronize()

    for each in (first, *found):
        same(each, wanted)


def test_threads_with_rows_of_their_own_do_not_see_each_other():
    model, host, plain, oracle = pair()
    x = tokens(2)
    wanted = {}
    for number in range(4):
        with oracle.rows([f"n{number}", None]):
            wanted[number] = answers(plain, x)
    wrong = []

    def run(number):
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(20):
                    with host.rows([f"n{number}", None]):
                        same(answers(model, x), wanted[number])
        except BaseException as error:  # noqa: BLE001  (told below)
            wrong.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert not wrong


def test_compiled_with_graphs_of_torchs_own_other_adapters_act_at_once():
    if not hasattr(torch.Tag, "cudagraph_unsafe"):
        pytest.skip("torch before 2.9 would capture the adapters")
    torch.compiler.reset()
    model, host, plain, oracle = pair(reserve="all-linear")
    compiled = torch.compile(model, mode="reduce-overhead")
    x = tokens(3)

    for turn in range(6):
        entries = ["n0", None, {"n1": 0.5, "n2": float(turn)}]
        if turn == 3:
            for each in (host, oracle):
                each.swap("n0", adapter(model, 40, 60, SITES[:3]))
        with torch.inference_mode(), host.rows(entries), oracle.rows(entries):
            torch.compiler.cudagraph_mark_step_begin()
            same(compiled(x, use_cache=False).logits.clone(), answers(plain, x))
    torch.compiler.reset()
