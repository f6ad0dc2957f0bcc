"""The invariants of a runtime for adapters, I-1 to I-25, each with its number.

Each was a fault of another system. Where the law is about files, composing or merging into
a checkpoint, other tests hold it:

I-1, I-3   composing: `laws/test_compose_laws.py` (one adapter at one is itself; linear in
           its weights; minus itself is zero); DoRA in `unit/composing/test_compose.py`
I-2        the oracles `tests/dense.py` and `tests/nets.py` share no code with the runtime
I-6, I-14  scalings by module, not by position: `unit/formats/test_peft_scalings.py`
I-7        `unit/formats/test_peft.py` and below
I-8, I-10  merging in place: `laws/test_unmerge_laws.py`; into a checkpoint:
           `journeys/test_peft_semantics_merged.py`
I-13       `laws/test_convert_laws.py`, `laws/test_engine_laws.py`
I-15       golden experts: `journeys/test_peft_semantics.py`, `test_peft_parity.py`
I-17       `laws/test_runtime_laws.py`, `journeys/test_rows_of_every_kind.py`
I-19, I-21, I-22  `journeys/test_runtime_costs.py`
I-20       `journeys/test_killed_merge.py`, `unit/merging/test_execute.py`,
           `benchmarks/merge_memory.py`
I-23       `journeys/test_compiled.py`
I-24       `unit/base/test_fit.py` and below
I-25       `unit/formats/test_detect.py`, `unit/tensors/test_checkpoint.py` and below
"""

import contextlib
import hashlib
import inspect
import itertools
import pickle
import random

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_hub
from lora_hub.adapter.adapter import Adapter, Replaced
from lora_hub.errors import FitError, InputError, LoraHubError
from lora_hub.formats.detect import open_adapter
from tests import dense, nets, peft_zoo
from tests.builders import logits, tiny_adapter, tiny_model, tiny_package

EXACT_SUMS = (
    "plain",
    "rslora",
    "patterns",
    "dora",
    "dora of embedding",
    "lora_bias",
    "embedding",
    "convolutions",
    "experts",
)


def sha256_of(model):
    return {
        name: hashlib.sha256(each.detach().flatten().view(torch.uint8).numpy()).hexdigest()
        for name, each in model.state_dict().items()
    }


def saved(name, folder):
    peft_zoo.save(peft_zoo.CASES[name], folder)
    return folder


def attached(name, *folders):
    model = peft_zoo.model(peft_zoo.CASES[name])
    host = lora_hub.attach(model)
    for folder in folders:
        host.load(folder, as_=folder.name)
    return model, host


def check_near(found, wanted):
    # float32 rounds some hundred times on the way; what is wrong is off by percents.
    error = float((found - wanted).norm() / wanted.norm())
    assert error <= 2e-5


@torch.no_grad()
def answer(found, rows=3):
    return found(
        found.batch(rows).to(found.head.weight.dtype)
        if is_float(found)
        else found.batch(rows)
    )


def is_float(found):
    return isinstance(found, nets.Signals)


def words(**adapters):
    """Return a net and a host with adapters, name → rank."""
    found = nets.net(nets.Words)
    host = lora_hub.attach(found)
    for name, rank in adapters.items():
        host.load(nets.adapter(found, rank, 10 * rank), as_=name)
    return found, host


@pytest.mark.parametrize("name", EXACT_SUMS)
def test_i_01_one_adapter_composed_at_one_acts_as_itself_bit_for_bit(name, tmp_path):
    folder = saved(name, tmp_path / "one")
    model, host = attached(name, folder)
    host.load(lora_hub.compose([(folder, 1.0)]), as_="composed")

    host.use("one")
    alone = peft_zoo.answer(AsPeft(model))
    host.use("composed")

    assert torch.equal(peft_zoo.answer(AsPeft(model)), alone)


class AsPeft:
    """A bare model, asked as PEFT's is."""

    def __init__(self, model):
        self._model = model

    def get_base_model(self):
        return self._model

    def __call__(self, *args, **kwargs):
        return self._model(*args, **kwargs)


def test_i_02_the_oracle_shares_no_code_with_us():
    source = inspect.getsource(dense)

    assert "import lora_hub" not in source
    assert "from lora_hub" not in source


def test_i_03_what_is_used_is_linear_in_its_weights_and_has_no_order():
    found, host = words(one=2, two=3)
    host.load(nets.adapter(found, 2, 20), as_="twin")

    def used(what):
        with host.using(what):
            return answer(found)

    bare = used(None)
    check_near(used({"one": 0.7, "two": -1.3}), used({"two": -1.3, "one": 0.7}))
    check_near(used({"one": 1.5, "twin": -1.5}), bare)
    check_near(used({"one": 0.25, "twin": 0.75}), used("one"))
    assert (used({"one": -1.0}) - used("one")).norm() > 1e-2 * bare.norm()


def test_i_04_swapping_a_leaves_names_that_contain_it_bit_for_bit():
    found, host = words(a=1, a2=2, xa=3, **{"a.b": 4, "A": 5})
    others = ["a2", "xa", "a.b", "A"]
    with host.rows(others):
        before = answer(found, 4)

    host.swap("a", nets.adapter(found, 6, 77))

    with host.rows(others):
        assert torch.equal(answer(found, 4), before)
    assert set(host.adapters) == {"a", *others}


@pytest.mark.parametrize(
    "name", ["rslora", "patterns", "dora", "embedding", "head", "rows", "experts", "gpt2"]
)
def test_i_05_i_06_swapped_in_is_as_loaded_fresh_and_as_peft(name, tmp_path):
    case = peft_zoo.CASES[name]
    folder = saved(name, tmp_path / "new")
    model = peft_zoo.model(case)
    targets = [
        key for key, each in model.named_modules() if type(each).__name__ == "Linear"
    ]
    host = lora_hub.attach(model)
    linear = targets[:3] or ["transformer.h.0.attn.c_attn"]
    old = Adapter(
        {
            target: nets.update(model.get_submodule(target), 3, seed)
            for seed, target in enumerate(sorted(linear))
        }
    )
    host.load(old, as_="one")
    host.load(folder, as_="fresh")
    host.use("one")
    before = peft_zoo.answer(AsPeft(model))

    host.swap("one", folder)
    swapped = peft_zoo.answer(AsPeft(model))
    with host.using("fresh"):
        fresh = peft_zoo.answer(AsPeft(model))
    host.swap("one", old)

    assert torch.equal(swapped, fresh)
    check_near(swapped, peft_zoo.answer(peft_zoo.loaded(case, folder)))
    assert torch.equal(peft_zoo.answer(AsPeft(model)), before)


def broken(folder, tmp_path):
    """Return adapters that cannot take a place, by what is wrong with them."""
    found = nets.net(nets.Words)
    wide = nets.update(torch.nn.Linear(9, 10), 2, 1)
    infinite = nets.adapter(found, {"q_proj": 2}, 1)
    infinite.updates["q_proj"].b[0, 0] = float("inf")
    return {
        "no such folder": tmp_path / "nowhere",
        "another model's": tiny_adapter(folder),
        "another shape": Adapter({"q_proj": wide}),
        "no such target": Adapter({"q_prod": nets.update(found.q_proj, 2, 1)}),
        "one good, one bad": Adapter(
            {**nets.adapter(found, {"mix": 2}, 1).updates, "zzz": wide}
        ),
        "not finite": infinite,
        "a tensor of another shape": Adapter(
            {}, replaced={"head.bias": Replaced(torch.zeros(3), role="bias")}
        ),
    }


def test_i_05_a_swap_that_fails_leaves_the_old_adapter_in_force(tmp_path):
    found, host = words(one=2, two=3)
    host.use({"one": 0.5, "two": 1.0})
    before, report = answer(found), host.adapters["one"]

    for why, what in broken(tmp_path / "tiny", tmp_path).items():
        with pytest.raises(LoraHubError):
            host.swap("one", what)

        assert torch.equal(answer(found), before), why
        assert host.adapters["one"] == report
        assert host.used == {"one": 0.5, "two": 1.0}
    with pytest.raises(LoraHubError):
        host.swap("three", nets.adapter(found, 1, 1))
    host.swap("one", nets.adapter(found, 1, 1))
    assert not torch.equal(answer(found), before)


def test_i_07_a_pattern_that_matches_nothing_is_refused(tmp_path):
    folder = tiny_adapter(tmp_path / "one", rank_pattern={"v_proj": 3})
    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace('"v_proj": 3', '"w_proj": 3'))

    with pytest.raises(LoraHubError, match="w_proj"):
        lora_hub.attach(tiny_model()).load(folder, as_="one")


@pytest.mark.parametrize(
    "name", ["lora_bias", "dora", "convolutions with biases", "rslora"]
)
def test_i_08_merged_in_place_gives_what_was_attached(name, tmp_path):
    model, host = attached(name, saved(name, tmp_path / "one"))
    host.use({"one": 0.7})
    wanted = peft_zoo.answer(AsPeft(model))

    host.merge()
    merged = peft_zoo.answer(AsPeft(model))

    check_near(merged, wanted)


OPERATIONS = {
    "use": lambda host, names, pick, _: host.use({pick(names): pick([1.0, -0.5, 0.0])}),
    "use two": lambda host, names, pick, _: host.use({names[0]: 0.5, names[-1]: -1.0}),
    "use none": lambda host, names, pick, _: host.use(None),
    "merge": lambda host, names, pick, _: host.merge(),
    "unmerge": lambda host, names, pick, _: host.unmerge(),
    "unload": lambda host, names, pick, _: host.unload(pick(names)),
    "swap": lambda host, names, pick, new: host.swap(pick(names), new()),
    "load": lambda host, names, pick, new: host.load(new(), as_=pick(["x", "y", "z"])),
    "block": lambda host, names, pick, _: in_block(host.using({pick(names): 0.5})),
    "rows": lambda host, names, pick, _: in_block(host.rows([pick(names), None, names[0]])),
}


def in_block(block):
    with block:
        pass


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_i_09_no_sequence_of_operations_changes_the_base(seed, dtype):
    found = nets.net(nets.NETS[seed % 2], dtype)
    before = sha256_of(found)
    chance = random.Random(seed)
    host = lora_hub.attach(found)
    parts = itertools.cycle([(), ("magnitude",), ("q",)])

    def new():
        return nets.adapter(
            found, chance.randint(1, 4), chance.randrange(1000), parts=next(parts)
        )

    host.load(new(), as_="one")
    bare = answer(found)

    done = []
    for _ in range(40):
        kind = chance.choice(sorted(OPERATIONS))
        try:
            OPERATIONS[kind](host, list(host.adapters) or ["none"], chance.choice, new)
        except LoraHubError:
            continue
        done.append(kind)
        answer(found)
    with contextlib.suppress(LoraHubError):  # it is not merged
        host.unmerge()
    host.use(None)

    assert len(set(done)) > 4
    assert sha256_of(found) == before
    assert torch.equal(answer(found), bare)
    host.detach()
    assert sha256_of(found) == before


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_i_10_a_thousand_merges_and_unmerges_leave_every_bit(dtype):
    found = nets.net(nets.Words, dtype)
    before = sha256_of(found)
    host = lora_hub.attach(found)
    host.load(nets.adapter(found, 3, 5), as_="one")
    host.load(nets.adapter(found, 2, 6, parts=("magnitude",)), as_="two")
    host.use({"one": 0.3, "two": -1.0})

    for _ in range(1000):
        host.merge()
        assert sha256_of(found) != before
        host.unmerge()
        assert sha256_of(found) == before


def test_i_11_the_same_name_with_other_bytes_is_another_adapter(tmp_path):
    base = tiny_package(tmp_path / "verse")
    other = tiny_package(
        tmp_path / "other", source=tiny_adapter(tmp_path / "source", seed=5)
    )
    model = tiny_model()
    host = lora_hub.attach(model)
    first = host.load(base)
    host.use(first.name)
    before = logits(model)

    with pytest.raises(InputError) as caught:
        host.load(other)
    same = host.load(base, as_="again")
    host.swap(first.name, other)

    assert caught.value.where == first.name
    assert same.digest == first.digest
    assert host.adapters[first.name].digest != first.digest
    assert not torch.equal(logits(model), before)
    host.use("again")
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("name", peft_zoo.CASES)
def test_i_12_every_tensor_is_applied_and_the_model_answers_otherwise(name, tmp_path):
    folder = saved(name, tmp_path / "one")
    model, host = attached(name)
    bare = peft_zoo.answer(AsPeft(model))
    source = open_adapter(folder)

    report = host.load(folder, as_="one")
    host.use("one")

    # Tied places are counted where they are named.
    assert report.targets == len(source.updates) + len(source.replacements)
    assert not torch.equal(peft_zoo.answer(AsPeft(model)), bare)


def test_i_12_a_tensor_without_a_place_is_refused_and_nothing_is_loaded(tmp_path):
    folder = tiny_adapter(tmp_path / "one")
    path = folder / "adapter_model.safetensors"
    held = load_file(path)
    named = {key.replace("layers.1.", "layers.7."): each for key, each in held.items()}
    save_file(named, path, {"format": "pt"})
    host = lora_hub.attach(tiny_model())

    with pytest.raises(FitError, match=r"layers\.7"):
        host.load(folder, as_="one")

    assert not host.adapters


def test_i_14_the_order_of_targets_has_no_say():
    found, host = words(one=3)
    adapter = nets.adapter(found, {"q_proj": 1, "mix": 5, "head": 2, "embed": 4}, 3)
    turned = Adapter(dict(reversed(adapter.updates.items())))
    host.load(adapter, as_="as is")
    host.load(turned, as_="turned")

    with host.using("as is"):
        wanted = answer(found)
    with host.using("turned"):
        assert torch.equal(answer(found), wanted)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer")
def test_i_16_what_changes_one_of_two_tied_layers_is_never_merged_into_both(tmp_path):
    model = peft_zoo.tied_llama().eval()
    fields = {"targets": ("embed_tokens", "q_proj"), "model": peft_zoo.tied_llama()}
    host = lora_hub.attach(model)
    report = host.load(tiny_adapter(tmp_path / "one", **fields), as_="one")
    before = sha256_of(model)
    host.use("one")
    attached = logits(model)

    assert any("lm_head" in note and "not changed" in note for note in report.notes)
    with pytest.raises(LoraHubError) as caught:
        host.merge()
    assert "lm_head" in f"{caught.value} {caught.value.hint}"
    assert sha256_of(model) == before
    assert torch.equal(logits(model), attached)


@pytest.mark.parametrize("kind", nets.NETS)
def test_i_17_every_order_of_four_rows_is_that_of_the_rows_alone(kind):
    found = nets.net(kind)
    host = lora_hub.attach(found)
    for name, rank in {"small": 1, "large": 32}.items():
        host.load(nets.adapter(found, rank, rank), as_=name)
    entries = [None, "small", "large", {"large": 0.5, "small": -1.0}]
    x = found.batch(4)

    with torch.no_grad():
        alone = []
        for row, entry in enumerate(entries):
            with host.using(entry):
                alone.append(found(x[row : row + 1])[0])
        for order in itertools.permutations(range(4)):
            with host.rows([entries[row] for row in order]):
                mixed = found(x[list(order)])
            for place, row in enumerate(order):
                check_near(mixed[place], alone[row])


@pytest.mark.parametrize("count", [0, 1, 2, 3, 8, 33])
def test_i_17_any_number_of_adapters_in_a_batch(count):
    found = nets.net(nets.Words)
    host = lora_hub.attach(found)
    names = [f"a{index}" for index in range(count)]
    for index, name in enumerate(names):
        host.load(nets.adapter(found, 1 + index % 9, index), as_=name)
    entries = [None, *names, None]
    x = found.batch(len(entries))

    with torch.no_grad(), host.rows(entries):
        mixed = found(x)

    for row, entry in enumerate(entries):
        with torch.no_grad(), host.using(entry):
            check_near(mixed[row], found(x[row : row + 1])[0])


@pytest.mark.parametrize("other", [(), ("magnitude",)])
def test_i_18_the_norm_of_dora_is_that_of_the_base_alone(other):
    found = nets.net(nets.Words)
    one = nets.adapter(found, 2, 5, parts=("magnitude",))
    two = nets.adapter(found, 3, 6, parts=other)
    wanted = nets.exact(found, [(one, 1.0), (two, 1.0)])(found.batch(3))
    host = lora_hub.attach(found)
    host.load(two, as_="two")
    host.use("two")
    host.load(one, as_="one")  # while another acts

    host.use({"one": 1.0, "two": 1.0})
    used = answer(found)
    host.merge()
    merged = answer(found)

    check_near(used, wanted)
    check_near(merged, wanted)


def test_i_24_a_wrong_base_is_refused_and_a_renamed_one_taken(tmp_path):
    package = tiny_package(tmp_path / "verse")
    wrong, renamed = tiny_model(seed=9), tiny_model()
    renamed.config._name_or_path = "somebody/elses-copy"

    with pytest.raises(FitError) as caught:
        lora_hub.attach(wrong).load(package)
    report = lora_hub.attach(renamed).load(package)

    assert "q_proj" in f"{caught.value} {caught.value.hint}"
    assert report.targets == 4


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_i_25_a_pickle_is_never_opened(tmp_path):
    folder = tiny_adapter(tmp_path / "one")
    (folder / "adapter_model.safetensors").unlink()
    trap = tmp_path / "opened"
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Payload(trap)))
    host = lora_hub.attach(tiny_model())

    for way in (
        lambda: host.load(folder, as_="one"),
        lambda: lora_hub.load_adapter(folder),
    ):
        with pytest.raises(LoraHubError, match="pickle"):
            way()

    assert not trap.exists()
    assert not host.adapters
