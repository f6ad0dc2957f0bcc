import math
import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
import torch

from lora_hub.adapter.adapter import Adapter
from lora_hub.adapter.load import load
from lora_hub.base.folder import FolderBase, describe
from lora_hub.composing.compose import compose
from lora_hub.errors import (
    ComposeError,
    FitError,
    InconclusiveError,
    InputError,
    NotFoundError,
)
from lora_hub.formats.detect import open_adapter
from lora_hub.formats.source import AdapterSource
from lora_hub.manifest.document import Base
from lora_hub.runtime.host import Host
from tests.builders import logits, tiny_adapter, tiny_base, tiny_model

DIGESTS = {
    name: "sha256:" + name[0].encode().hex().ljust(64, "0") for name in ("one", "two")
}


@dataclass(frozen=True)
class Found:
    source: AdapterSource
    name: str | None = None
    version: str | None = None
    digest: str | None = None
    base: Base | None = None
    notes: tuple[str, ...] = ()
    again: None = None


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return {
        "one": open_adapter(tiny_adapter(folder / "one", rank=2, seed=1)),
        "two": open_adapter(
            tiny_adapter(
                folder / "two",
                rank=3,
                alpha=2,
                use_rslora=True,
                targets=("v_proj", "up_proj"),
                seed=2,
            )
        ),
    }


@pytest.fixture(scope="module")
def base(tmp_path_factory, sources):
    folder = tiny_base(tmp_path_factory.mktemp("base") / "base")
    with FolderBase.open(folder) as view:
        return describe(view, [update.target for update in sources["one"].updates])


@pytest.fixture
def model():
    return tiny_model()


@pytest.fixture
def host(model, sources):
    return Host(
        model,
        lambda what: Found(sources[what], f"tiny/{what}", "1.0.0", DIGESTS[what]),
    )


def with_deltas(terms):
    """Return the logits of a model into whose weights the deltas were added in float64."""
    model = tiny_model().double()
    with torch.no_grad():
        for source, weight in terms:
            for target, update in load(source).updates.items():
                change = update.b.double() @ torch.diag(update.scaling) @ update.a.double()
                model.get_submodule(target).weight += weight * change
    return logits(model)


def check(found, wanted):
    # float32 through two layers; the deltas move the logits by more than 0.1.
    assert (found - wanted).abs().max() <= 2e-6 * wanted.abs().max()


def test_loading_says_that_all_targets_are_applied_and_changes_nothing(host, model):
    before = logits(model)

    report = host.load("one")

    assert report.targets == 4
    assert str(report) == (
        "tiny/one 1.0.0: 4 of 4 targets applied; its base was not identified, only names "
        "and shapes were compared"
    )
    assert host.adapters == {"tiny/one": report}
    assert dict(host.used) == {}
    assert torch.equal(logits(model), before)


def test_used_adapters_act_as_if_their_deltas_were_in_the_weights(host, model, sources):
    host.load("one")
    host.load("two")

    for weights in ({"one": 1.0}, {"two": 1.0}, {"one": 0.7, "two": -0.4}):
        host.use({f"tiny/{name}": weight for name, weight in weights.items()})
        terms = [(sources[name], weight) for name, weight in weights.items()]
        check(logits(model), with_deltas(terms))
        assert (logits(model) - logits(tiny_model())).abs().max() > 0.1


def test_a_name_alone_means_weight_one(host, model, sources):
    host.load("two")

    host.use("tiny/two")

    assert dict(host.used) == {"tiny/two": 1.0}
    check(logits(model), with_deltas([(sources["two"], 1.0)]))


@pytest.mark.parametrize("nothing", [None, {}, {"tiny/one": 0}])
def test_using_nothing_is_the_base_bit_for_bit(host, model, nothing):
    before = logits(model)
    host.load("one")
    host.use("tiny/one")

    host.use(nothing)

    assert torch.equal(logits(model), before)


def test_an_adapter_and_its_negative_cancel(host, model, sources):
    before = logits(model)
    host.load("one")
    host.load(load(sources["one"]), as_="twin")

    host.use({"tiny/one": 0.5, "twin": -0.5})

    check(logits(model), before)


def test_using_restores_what_was_used_before_also_after_an_error(host, model):
    host.load("one")
    host.load("two")
    host.use({"tiny/one": 0.5})
    before = logits(model)

    def fail():
        with host.using("tiny/two"):
            with host.using(None):
                assert dict(host.used) == {}
            assert dict(host.used) == {"tiny/two": 1.0}
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert dict(host.used) == {"tiny/one": 0.5}
    assert torch.equal(logits(model), before)


def test_a_failed_use_leaves_in_force_what_was_used(host, model):
    host.load("one")
    host.use("tiny/one")
    before = logits(model)

    with pytest.raises(NotFoundError) as error:
        host.use({"tiny/one": 0.5, "tiny/two": 0.5})

    assert error.value.where == "tiny/two"
    assert error.value.hint == "loaded: tiny/one (names without versions)"
    assert dict(host.used) == {"tiny/one": 1.0}
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("weight", [math.nan, math.inf, True])
def test_refuses_a_weight_that_is_no_finite_number(host, weight):
    host.load("one")

    with pytest.raises(InputError, match="expected a finite number"):
        host.use({"tiny/one": weight})


def test_no_hook_is_left_when_nothing_is_used(host, model):
    host.load("one")
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]

    host.use("tiny/one")
    hooked = [layer for layer in layers if layer._forward_hooks]
    host.use(None)

    assert len(hooked) == 4
    assert not any(layer._forward_hooks for layer in layers)
    assert not any(layer._forward_hooks_with_kwargs for layer in layers)


def test_loading_the_same_digest_again_changes_nothing(host, model):
    host.load("one")
    host.use("tiny/one")
    before = logits(model)

    report = host.load("one")

    assert list(host.adapters) == ["tiny/one"]
    assert host.adapters["tiny/one"] == report
    assert torch.equal(logits(model), before)


def test_a_name_is_not_given_to_another_adapter(host):
    host.load("one")

    with pytest.raises(
        InputError, match="another adapter is loaded under this name"
    ) as error:
        host.load("two", as_="tiny/one")

    assert error.value.where == "tiny/one"
    assert host.adapters["tiny/one"].digest == DIGESTS["one"]


def test_unloading_lets_go_and_frees_the_name(host):
    host.load("one")

    host.unload("tiny/one")

    assert dict(host.adapters) == {}
    assert host.load("two", as_="tiny/one").digest == DIGESTS["two"]


def test_an_adapter_in_use_is_not_unloaded(host):
    host.load("one")
    host.use("tiny/one")

    with pytest.raises(InputError, match="in use and cannot be unloaded"):
        host.unload("tiny/one")
    with host.using(None), pytest.raises(InputError, match="in use"):
        host.unload("tiny/one")

    host.use(None)
    host.unload("tiny/one")


def test_unloading_what_is_not_loaded_says_what_to_do(host):
    with pytest.raises(NotFoundError) as error:
        host.unload("tiny/one")

    assert error.value.hint == "nothing is loaded; host.load(...) first"


def test_a_detached_host_leaves_the_model_and_refuses_work(host, model):
    before = logits(model)
    host.load("one")

    with host.using("tiny/one"):
        host.detach()
    host.detach()

    assert torch.equal(logits(model), before)
    assert repr(host) == "Host(detached)"
    for act in (lambda: host.load("one"), lambda: host.use(None), lambda: host.unload("x")):
        with pytest.raises(InputError, match="was detached"):
            act()


def test_an_adapter_without_a_name_asks_for_one(model, sources):
    host = Host(model, lambda _what: Found(sources["one"]))

    with pytest.raises(InputError, match="no name of its own") as error:
        host.load("./somewhere")

    assert error.value.where == "./somewhere"
    assert host.load("./somewhere", as_="mine").name == "mine"


def test_without_find_only_adapters_in_memory_are_loaded(model, sources):
    host = Host(model)

    with pytest.raises(InputError, match="not told where adapters are found"):
        host.load("tiny/one")

    assert host.load(load(sources["one"]), as_="mine").targets == 4


def test_the_recorded_base_is_compared_and_the_report_says_how(model, sources, base):
    host = Host(model, lambda _what: Found(sources["one"], "tiny/one", "1.0.0", base=base))

    report = host.load("one")

    assert (report.fit.checked, report.fit.total) == (4, 4)
    assert "4 of 4 tensors of the base are as recorded" in str(report)


def test_another_base_is_refused_and_nothing_is_loaded(sources, base):
    host = Host(
        tiny_model(seed=5), lambda _what: Found(sources["one"], "tiny/one", base=base)
    )

    with pytest.raises(FitError, match="other weights"):
        host.load("one")
    assert dict(host.adapters) == {}

    assert host.load("one", policy="struct").fit.policy == "struct"


def test_a_policy_that_needs_a_base_is_inconclusive_without_one(host):
    with pytest.raises(InconclusiveError, match="policy 'targets' cannot be checked"):
        host.load("one", policy="targets")


def test_a_composed_adapter_says_which_targets_nobody_compared(model, sources, base):
    both = compose([(load(sources["one"], base=base), 1.0), (load(sources["two"]), 1.0)])

    report = Host(model).load(both, as_="both")

    assert report.targets == 6
    assert report.fit.checked == 4
    assert report.notes == (
        "2 of its targets come from an adapter whose base was not identified",
    )


def test_a_missing_target_is_refused_by_name(sources):
    adapter = load(sources["one"])
    extra = Adapter(
        {**adapter.updates, "model.layers.9.x": next(iter(adapter.updates.values()))}
    )

    with pytest.raises(
        FitError, match=r"1 of 5 targets .* model.layers.9.x does not exist"
    ):
        Host(tiny_model()).load(extra, as_="mine")


def test_composed_and_used_together_are_the_same(host, model, sources):
    host.load("one")
    host.load("two")
    composed = compose([(load(sources["one"]), 0.7), (load(sources["two"]), -0.4)])
    host.load(composed, as_="both")

    host.use({"tiny/one": 0.7, "tiny/two": -0.4})
    together = logits(model)
    host.use("both")

    check(logits(model), together)


def test_a_model_that_was_moved_or_cast_is_followed(host, model, sources):
    host.load("two")
    host.use("tiny/two")

    model.double()

    # The factors were folded in float32 before the model became wider.
    check(logits(model), with_deltas([(sources["two"], 1.0)]))


def test_is_shown_with_what_it_holds(host):
    host.load("one")
    host.use({"tiny/one": 0.5})

    assert repr(host) == "Host(LlamaForCausalLM, loaded: tiny/one, used: tiny/one=0.5)"


COMPILED = """
import torch
from lora_hub.adapter.adapter import Adapter
from lora_hub.adapter.update import Update
from lora_hub.runtime.host import Host

model = torch.nn.Sequential(torch.nn.Linear(4, 4))
update = Update(torch.ones(1, 4), torch.ones(4, 1), torch.ones(1, dtype=torch.float64))
host = Host(model)
host.load(Adapter({"0": update}), as_="ones")
compiled = torch.compile(model, backend="eager")
x = torch.ones(2, 4)
base = compiled(x)
host.use("ones")
used = compiled(x)
host.detach()
print(round(float((used - base).min()), 3), torch.equal(compiled(x), base))
"""


def test_compiled_code_sees_what_is_used():
    # In a process of its own: the checks of shapes in tests cannot be compiled.
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True)

    assert done.stdout == "4.0 True\n", done.stderr


def test_a_layer_that_was_replaced_is_not_used_in_vain(host, model):
    host.load("one")
    attention = model.model.layers[1].self_attn
    attention.q_proj = torch.nn.Linear(16, 16, bias=False)

    with pytest.raises(FitError, match=r"layers\.1\.self_attn\.q_proj was replaced"):
        host.use("tiny/one")

    assert dict(host.used) == {}


def test_refuses_weights_that_overflow_what_is_computed_in(host, model):
    host.load("one")

    with pytest.raises(InputError, match="not finite"):
        host.use({"tiny/one": 1e39})

    assert dict(host.used) == {}


def test_the_same_bits_without_a_digest_are_the_same_adapter(model, sources):
    host = Host(model)
    host.load(load(sources["one"]), as_="mine")

    host.load(load(sources["one"]), as_="mine")

    with pytest.raises(InputError, match="another adapter"):
        host.load(load(sources["two"]), as_="mine")


def test_swap_exchanges_the_adapter_wherever_its_name_is_used(host, model, sources):
    host.load("one")
    host.load("two", as_="tiny/one2")
    host.use({"tiny/one": 0.5, "tiny/one2": -1.0})

    report = host.swap("tiny/one", "two")

    assert report.digest == DIGESTS["two"]
    assert host.adapters["tiny/one"] == report
    check(logits(model), with_deltas([(sources["two"], -0.5)]))
    host.swap("tiny/one", "one")
    terms = [(sources["one"], 0.5), (sources["two"], -1.0)]
    check(logits(model), with_deltas(terms))


def test_a_swap_that_expects_another_digest_changes_nothing(host):
    host.load("one")

    with pytest.raises(InputError, match=f"in place is {DIGESTS['one']}, expected"):
        host.swap("tiny/one", "two", expected=DIGESTS["two"])

    assert host.adapters["tiny/one"].digest == DIGESTS["one"]


def test_a_swap_that_fails_leaves_the_old_adapter_in_force(host, model, sources):
    host.load("one")
    host.use({"tiny/one": 2.0})
    before = logits(model)
    adapter = load(sources["one"])
    target, update = next(iter(adapter.updates.items()))
    huge = replace(update, b=update.b * 0 + 3e38)

    with pytest.raises(ComposeError, match="not finite"):
        host.swap(
            "tiny/one", Adapter({target: replace(huge, scaling=huge.scaling * 0 + 1)})
        )

    assert host.adapters["tiny/one"].digest == DIGESTS["one"]
    assert torch.equal(logits(model), before)


def test_use_inside_of_a_block_is_refused(host):
    host.load("one")

    with host.using(None), pytest.raises(InputError, match="a block of `using`"):
        host.use("tiny/one")


def test_merged_adapters_cost_nothing_until_they_are_unmerged(host, model, sources):
    host.load("one")
    host.load("two")
    host.use({"tiny/one": 0.5})
    used = logits(model)

    host.merge()

    check(logits(model), with_deltas([(sources["one"], 0.5)]))
    assert not any(module._forward_hooks for module in model.modules())
    for act in (
        lambda: host.use(None),
        lambda: host.load("one"),
        lambda: host.swap("tiny/one", "two"),
        lambda: host.merge("tiny/two"),
    ):
        with pytest.raises(InputError, match="merged into the weights"):
            act()
    with pytest.raises(InputError, match="in use"):
        host.unload("tiny/one")
    host.unmerge()
    assert torch.equal(logits(model), used)
    host.use(None)
    assert torch.equal(logits(model), logits(tiny_model()))


def test_reserved_layers_keep_their_hook(model):
    host = Host(model, reserve=["q_proj"])

    host.use(None)

    assert sum(bool(module._forward_hooks) for module in model.modules()) == 3
    host.detach()
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(InputError, match="no layer of this name"):
        Host(model, reserve=["nothing"])
