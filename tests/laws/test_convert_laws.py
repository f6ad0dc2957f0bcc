"""What holds between any two dialects: what comes back is what went in, bit for bit.

An adapter that both dialects can say goes through the first, then through the second.
Which those are, the table in the code says; what it says no to is shown to be refused.
"""

import contextlib
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_hub.errors import LoraHubError, LossyConversion
from lora_hub.formats import factors
from lora_hub.formats.detect import DIALECTS
from lora_hub.formats.dialect import FEATURES
from lora_hub.formats.matrices import Matrix
from lora_hub.formats.source import Replacement, ScaleSource
from lora_hub.scaling import alpha_of, scaling, spell
from lora_hub.tensors.file import TensorFile
from tests import adapters
from tests.adapters import (
    CONV,
    CONVS,
    EMBEDDING,
    GATE_UP,
    K0,
    LANGUAGE,
    PIPELINE,
    Q0,
    SWITCH,
    TO_OUT,
    TO_Q,
)

RULES = st.sampled_from(["alpha/r", "alpha/sqrt(r)"])
ALPHAS = st.one_of(
    st.sampled_from([0.5, 1.0, 2.0, 8.0, 16.0, 32.0]),
    st.floats(2**-10, 2**10, width=32),
)
PAIRS = list(itertools.product(DIALECTS, repeat=2))


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {
        # Mixtral, since llama.cpp has experts only where the model has.
        "language": adapters.language_base(folder / "language", model_type="mixtral"),
        "components": adapters.pipeline_base(folder / "pipeline"),
    }


# Experts have names of their own in MLX-LM, and llama.cpp those of transformers.
EXPERTS = {"mlx": {SWITCH}, "gguf": {GATE_UP}}


def layers(kind, says, pair):
    """Return target → what kind of layer it is, for all that two dialects can say."""
    found = dict.fromkeys(LANGUAGE if kind == "language" else PIPELINE, "linear")
    if kind == "language":
        if "embeddings" in says:
            found[EMBEDDING] = "embedding"
        named = set.intersection(*(EXPERTS.get(name, {SWITCH, GATE_UP}) for name in pair))
        if "experts" in says and named:
            found[min(named)] = "experts"
    elif "convolutions" in says:
        found |= dict.fromkeys(CONVS, "conv")
    return found


@st.composite
def adapter_parts(draw, says, pair):
    """Draw factors that a dialect saying these features can say, and the kind of names."""
    kinds = sorted(says & {"language", "components"})
    kind = draw(st.sampled_from(kinds))
    of = layers(kind, says, pair)
    # PEFT knows DoRA and a bias beside the factors for all targets or none.
    more = draw(st.sampled_from(["", *sorted(says & {"dora", "lora_bias"})]))
    if more:
        kept = {"linear", "conv"}
        if more == "dora" and set(pair) == {"peft"}:
            kept.add("embedding")  # MLX-LM's magnitudes of an embedding are others
        of = {target: layer for target, layer in of.items() if layer in kept}
    targets = draw(st.lists(st.sampled_from(sorted(of)), min_size=1, unique=True))
    dtypes = ["F32", "F16", "BF16"] + (["F64"] if "float64" in says else [])
    dtype = draw(st.sampled_from(dtypes))
    rule = draw(RULES) if "rslora" in says else "alpha/r"
    ranks, alphas = st.integers(1, 9), ALPHAS
    if "alpha64" in says:
        alphas |= st.floats(1e-3, 1e3)
    rank, alpha = draw(ranks), draw(alphas)
    parts = []
    for target in targets:
        if "ranks" in says and "scalings" in says:
            rank = draw(ranks)
        if "scalings" in says:
            alpha = draw(alphas)
        parts.append(
            adapters.part(
                target,
                rank=rank,
                alpha=alpha,
                rule=rule,
                dtype=dtype,
                layer=of[target],
                kernel=CONVS.get(target, ()),
                experts=2 if of[target] == "experts" else 1,
                dora=more == "dora",
                bias=more == "lora_bias",
            )
        )
    return kind, parts


@pytest.mark.parametrize(
    ("one", "two"),
    [
        pair
        for pair in PAIRS
        if DIALECTS[pair[0]].says & DIALECTS[pair[1]].says & {"language", "components"}
    ],
)
def test_through_two_dialects_and_back_is_the_identity(one, two, bases):
    says = DIALECTS[one].says & DIALECTS[two].says

    @settings(max_examples=15, deadline=None)
    @given(adapter_parts(says, (one, two)))
    def holds(drawn):
        kind, parts = drawn
        base, alpha = bases[kind], adapters_alpha(parts)
        first = adapters.source(*parts)

        second = through(one, first, base, alpha)
        third = through(two, second, base, alpha)

        assert adapters.content(second) == adapters.content(first)
        assert adapters.content(third) == adapters.content(first)

    holds()


def through(dialect, adapter, base, alpha):
    files = adapters.written(dialect, adapter, base)
    return adapters.read_back(dialect, files, base=base, alpha=alpha)


def adapters_alpha(parts):
    """Return the alpha that a user of loralib would say; one stands for all there."""
    return alpha_of(parts[0].scaling, parts[0].rank, "alpha/r")


@pytest.mark.parametrize("dialect", DIALECTS)
def test_dense_deltas_are_those_of_the_source(dialect, bases):
    kind = "language" if "language" in DIALECTS[dialect].says else "components"
    targets = LANGUAGE if kind == "language" else PIPELINE
    adapter = adapters.source(*(adapters.part(t, rank=3, alpha=1.5) for t in targets))

    found = through(dialect, adapter, bases[kind], 1.5)

    for target, delta in adapters.deltas(adapter).items():
        np.testing.assert_array_equal(adapters.deltas(found)[target], delta)


def needing(feature, kind, dialect):
    """Return an adapter that cannot be said without the feature."""
    one, two = (Q0, K0) if kind == "language" else (TO_Q, TO_OUT)
    experts = min(EXPERTS.get(dialect, {GATE_UP}))
    beside = BESIDE.get(feature)
    if beside:
        return beside(adapters.source(adapters.part(one), adapters.part(two)), one)
    found = adapters.source(
        *{
            "language": lambda: [adapters.part(Q0)],
            "components": lambda: [adapters.part(TO_Q)],
            "ranks": lambda: [
                adapters.part(one, rank=2, alpha=2),
                adapters.part(two, rank=4, alpha=4),
            ],
            "scalings": lambda: [
                adapters.part(one, alpha=2),
                adapters.part(two, alpha=3),
            ],
            # No alpha/3 is this number, see test_scalings_without_an_alpha.
            "rslora": lambda: [adapters.part(one, rank=3, alpha=1.6, rule="alpha/sqrt(r)")],
            "alpha64": lambda: [adapters.part(one, alpha=0.1)],
            "float64": lambda: [adapters.part(one, dtype="F64")],
            "embeddings": lambda: [adapters.part(EMBEDDING, layer="embedding")],
            "ties": lambda: [adapters.part(EMBEDDING, layer="embedding")],
            "convolutions": lambda: [adapters.part(CONV, layer="conv")],
            "experts": lambda: [adapters.part(experts, layer="experts", experts=2)],
            "dora": lambda: [adapters.part(one, dora=True)],
            "lora_bias": lambda: [adapters.part(one, bias=True)],
        }[feature]()
    )
    return replace(found, ties_weights=feature == "ties")


def replacing(source, one, rows):
    """Return the adapter with a tensor of the base, or rows of one, brought anew."""
    tensors = {name: factors.matrix(source.tensors, held) for name, held in infos(source)}
    tensors["new"] = Matrix("F32", (3, 2), bytes(24))
    data = b"".join(factors.safetensors(tensors))
    file = TensorFile.from_bytes(data, where="adapter")
    updates = tuple(
        replace(update, a=file.info(update.a.name), b=file.info(update.b.name))
        for update in source.updates
    )
    name, role = ("score.weight", "modules_to_save")
    if rows:
        name, role = ("model.embed_tokens.weight", "token_delta")
    new = Replacement(name, role, file.info("new"), rows)
    return replace(source, updates=updates, tensors=file, replacements=(new,))


def infos(source):
    return source.tensors.header.tensors.items()


def scaling_outputs(source, one):
    """Return the adapter with a vector of IA3; that it is a factor's is no matter here."""
    vector = source.updates[0].a
    return replace(source, scales=(ScaleSource(one, "rows", vector),))


# What stands beside the updates of an adapter.
BESIDE = {
    "replaced": lambda source, one: replacing(source, one, None),
    "rows": lambda source, one: replacing(source, one, (1, 4, 5)),
    "scales": scaling_outputs,
    "alora": lambda source, one: replace(source, alora_tokens=(1, 2)),
}


WHOLE = [
    (one, two, feature)
    for one, two in PAIRS
    for feature in ("ties", *BESIDE)
    if feature in DIALECTS[one].says & DIALECTS[two].says
]


@pytest.mark.parametrize(("one", "two", "feature"), WHOLE)
def test_what_stands_beside_the_updates_comes_through_two_dialects(one, two, feature):
    adapter = needing(feature, "language", one)

    found = through(two, through(one, adapter, None, 2.0), None, 2.0)

    assert adapters.content(found) == adapters.content(adapter)
    assert found.alora_tokens == adapter.alora_tokens
    assert beside(found) == beside(adapter)


def beside(source):
    """Return what replaces tensors of the base, with its numbers."""
    return [
        (r.name, r.role, r.rows, r.tensor.dtype, r.tensor.shape, numbers(source, r.tensor))
        for r in source.replacements
    ]


def numbers(source, tensor):
    return bytes(source.tensors.read(tensor.name))


CASES = list(itertools.product(DIALECTS, FEATURES))


@pytest.mark.parametrize(("dialect", "feature"), CASES)
def test_table_of_what_each_dialect_says_is_true(dialect, feature, bases):
    says = DIALECTS[dialect].says
    kind = "language" if "language" in says else "components"
    base = bases[kind]
    if feature in ("language", "components"):
        kind = feature
        base = bases[kind] if feature in says else base
    adapter = needing(feature, kind, dialect)
    if feature == "ranks" and dialect in ("loralib", "gguf"):
        adapter = adapters.source(
            adapters.part(Q0, rank=2, alpha=2), adapters.part(K0, rank=4, alpha=2)
        )

    if feature in says:
        # Where the base's output is no embedding, MLX-LM ties nothing.
        at = None if feature == "ties" else base
        found = through(dialect, adapter, at, 2.0)
        if dialect != "loralib" or feature == "ranks":
            assert adapters.content(found) == adapters.content(adapter)
            assert found.alora_tokens == adapter.alora_tokens
            assert [(r.name, r.role, r.rows) for r in found.replacements] == (
                [(r.name, r.role, r.rows) for r in adapter.replacements]
            )
    else:
        with pytest.raises(LossyConversion) as error:
            adapters.written(dialect, adapter, base)
        assert error.value.losses


@settings(max_examples=500)
@given(st.floats(1e-6, 1e6), st.integers(1, 512), RULES)
def test_alpha_is_found_again_from_its_scaling(alpha, rank, rule):
    wanted = scaling(alpha, rank, rule)

    assert scaling(alpha_of(wanted, rank, rule), rank, rule) == wanted
    found, found_rule = spell(wanted, rank)
    assert scaling(found, rank, found_rule) == wanted


@settings(max_examples=500)
@given(st.floats(1e-6, 1e6), st.integers(1, 512))
def test_any_scaling_is_spelt_to_the_last_bit_but_one(wanted, rank):
    alpha, rule = spell(wanted, rank)

    assert abs(scaling(alpha, rank, rule) - wanted) <= math.ulp(wanted)


@settings(max_examples=500)
@given(st.floats(2**-20, 2**20, width=32), st.integers(1, 512))
def test_the_float32_alpha_is_found_whatever_float64_alpha_was_said(alpha, rank):
    scaled = alpha / rank
    part = adapters.part(Q0, rank=rank, alpha=alpha_of(scaled, rank, "alpha/r"))

    assert factors.float32_alpha(part) == alpha


def test_scalings_without_an_alpha():
    wanted = scaling(1.6, 3, "alpha/sqrt(r)")

    assert scaling(alpha_of(wanted, 3, "alpha/r"), 3, "alpha/r") != wanted


@pytest.mark.parametrize("dialect", DIALECTS)
def test_damaged_files_are_refused_with_an_error_of_ours_or_read(dialect, bases):
    kind = "language" if "language" in DIALECTS[dialect].says else "components"
    target = Q0 if kind == "language" else TO_Q
    adapter = adapters.source(adapters.part(target))
    files = adapters.written(dialect, adapter, bases[kind])
    name = DIALECTS[dialect].weights_name

    @settings(max_examples=80, deadline=None)
    @given(st.data())
    def holds(drawn):
        data = bytearray(files[name])
        for _ in range(drawn.draw(st.integers(1, 4))):
            # Nearly all that can be misread stands in the first bytes.
            at = drawn.draw(st.integers(0, min(len(data), 600) - 1))
            data[at] = drawn.draw(st.integers(0, 255))
        cut = drawn.draw(st.integers(0, len(data)))
        end = cut if drawn.draw(st.booleans()) else len(data)
        damaged = files | {name: bytes(data[:end])}

        with contextlib.suppress(LoraHubError):
            adapters.read_back(dialect, damaged, base=bases[kind], alpha=1.0)

    holds()
