"""What an engine would not compute is refused, each by its name and place."""

from dataclasses import replace

import pytest

from lora_hub.errors import LossyConversion
from lora_hub.formats.engines.fit import fit
from lora_hub.formats.engines.refused import FEATURES, losses
from lora_hub.formats.engines.table import ENGINES
from lora_hub.formats.source import Replacement, ScaleSource
from tests.adapters import K0, Q0, part, source
from tests.builders import tiny_base


def plain():
    return source(part(Q0), part(K0))


def with_update(**fields):
    """Return an adapter whose first update has these fields too."""
    whole = plain()
    first, *rest = whole.updates
    return replace(whole, updates=(replace(first, **fields), *rest))


def with_replacement(role, rows=None):
    whole = plain()
    tensor = whole.updates[0].a
    new = Replacement("model.embed_tokens.weight", role, tensor, rows)
    return replace(whole, replacements=(new,))


def scales():
    whole = plain()
    return replace(whole, scales=(ScaleSource(Q0, "rows", whole.updates[0].a),))


def tensor():
    return plain().updates[0].a


# feature → an adapter that has it, and the place that is named
HAVING = {
    "alora": (lambda: replace(plain(), alora_tokens=(1, 2)), "the tokens are 1 2"),
    "bias": (lambda: with_replacement("bias"), "model.embed_tokens.weight"),
    "components": (
        lambda: source(part("unet.mid_block.to_q", shape=(8, 8))),
        "unet.mid_block.to_q",
    ),
    "conv": (lambda: with_update(layer="conv"), K0),
    "dora": (lambda: with_update(magnitude=tensor()), K0),
    "embedding": (lambda: with_update(layer="embedding"), K0),
    "embedding weights": (
        lambda: with_replacement("embedding"),
        "model.embed_tokens.weight",
    ),
    "experts": (lambda: with_update(layer="experts"), K0),
    "ia3": (scales, Q0),
    "lora_bias": (lambda: with_update(bias=tensor()), K0),
    "modules_to_save": (
        lambda: with_replacement("modules_to_save"),
        "model.embed_tokens.weight",
    ),
    "tied": (lambda: replace(plain(), ties_weights=True), "the adapter says so"),
    "token rows": (
        lambda: with_replacement("token_delta", (3, 4)),
        "model.embed_tokens.weight",
    ),
}


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
def test_feature_is_refused_by_name_where_the_table_says_so(engine, feature):
    adapter, place = HAVING[feature][0](), HAVING[feature][1]

    if feature not in engine.cannot:
        assert not any(FEATURES[feature][0] in loss for loss in losses(adapter, engine))
        return
    with pytest.raises(LossyConversion) as error:
        fit(adapter, engine)

    words = f"{engine.title} {engine.cannot[feature]}: {FEATURES[feature][0]} ({place}"
    assert any(loss.startswith(words) for loss in error.value.losses)
    assert "lorahub merge" in (error.value.hint or "")


@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
def test_table_names_features_that_there_are(engine):
    assert engine.cannot.keys() <= FEATURES.keys()


@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
def test_names_of_gpt2_are_no_pipeline(engine):
    adapter = source(part("transformer.h.0.attn.c_attn", shape=(8, 8)))

    assert losses(adapter, engine) == ()


@pytest.mark.parametrize("name", ["vllm", "sglang"])
def test_embedding_of_another_name_is_refused(name):
    whole = source(part(Q0), part("transformer.wte", shape=(8, 8)))
    updates = tuple(
        replace(update, layer="embedding") if update.target != Q0 else update
        for update in whole.updates
    )

    found = losses(replace(whole, updates=updates), ENGINES[name])

    title = ENGINES[name].title
    assert found == (
        f"{title} knows no embedding but embed_tokens: updates of transformer.wte",
    )


def with_saved_embedding(base, change):
    """Return an adapter that brings the base's embedding along, a number of it changed."""
    from lora_hub.formats import factors
    from lora_hub.formats.matrices import Matrix
    from lora_hub.tensors.checkpoint import Checkpoint
    from lora_hub.tensors.file import TensorFile

    name = "model.embed_tokens.weight"
    with Checkpoint.open(base) as checkpoint:
        info = checkpoint.tensors[name]
        data = bytearray(checkpoint.read(name))
    data[0] ^= change
    whole = plain()
    tensors = {
        each.name: factors.matrix(whole.tensors, each)
        for update in whole.updates
        for each in update.tensors
    }
    tensors["saved"] = Matrix(info.dtype, info.shape, bytes(data))
    file = TensorFile.from_bytes(b"".join(factors.safetensors(tensors)), where="adapter")
    new = Replacement(name, "embedding", file.info("saved"))
    return replace(whole, tensors=file, replacements=(new,))


def test_embedding_that_is_the_base_s_own_is_left_out(tmp_path):
    base = tiny_base(tmp_path / "base")

    fitted = fit(with_saved_embedding(base, 0), ENGINES["vllm"], base)

    assert fitted.source.replacements == ()
    assert any("the base's own, bit for bit" in note for note in fitted.notes)


def test_embedding_that_was_trained_is_refused(tmp_path):
    base = tiny_base(tmp_path / "base")

    with pytest.raises(LossyConversion, match="a whole embedding beside the factors"):
        fit(with_saved_embedding(base, 1), ENGINES["vllm"], base)


def test_all_losses_are_listed_at_once():
    adapter = replace(with_update(magnitude=tensor()), alora_tokens=(7,))

    with pytest.raises(LossyConversion) as error:
        fit(adapter, ENGINES["vllm"])

    assert len(error.value.losses) == 2
