"""What holds for every manifest: its bytes tell it whole, and follow the schema."""

import json

import jsonschema
import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_hub.manifest import codec
from lora_hub.manifest import document as d
from lora_hub.manifest.schema import manifest_schema
from tests.builders import tiny_manifest

NAME = st.from_regex(r"[a-z_]{1,8}(\.[a-z0-9_]{1,8}){0,3}", fullmatch=True)
SHAPE = st.lists(st.integers(0, 99), max_size=5).map(tuple)
COUNTS = st.lists(st.integers(0, 99), max_size=4).map(tuple)
RANK = st.integers(1, 99)
LAYERS = st.sampled_from(["linear", "embedding", "conv", "experts"])
ROLES = st.sampled_from(["modules_to_save", "bias", "embedding", "token_delta"])
KINDS = st.tuples(
    st.sampled_from(["lora", "rslora", "dora"]),
    st.sampled_from(["", "+modules"]),
    st.sampled_from(["", "+tokens"]),
).map("".join)
MODULES = st.builds(
    d.Module,
    module=NAME,
    rank=RANK,
    alpha=st.floats(0.5, 99),
    scaling=st.sampled_from(["alpha/r", "alpha/sqrt(r)"]),
    dtype=st.just("F32"),
    a=SHAPE,
    b=SHAPE,
    bias=st.booleans(),
    layer=LAYERS,
    magnitude=st.booleans(),
    layout=st.sampled_from([None, "a expert-major, b rank-major"]),
    experts=st.none() | RANK,
)
EXTRA = st.builds(
    d.ExtraTensor,
    name=NAME,
    role=ROLES,
    shape=SHAPE,
    dtype=st.just("BF16"),
    rows=st.none() | COUNTS,
)
SCHEMA = jsonschema.Draft202012Validator(manifest_schema())


@settings(deadline=None)
@given(
    kind=KINDS,
    modules=st.lists(MODULES, min_size=1, max_size=3).map(tuple),
    extra=st.lists(EXTRA, max_size=3).map(tuple),
    tokens=COUNTS,
    ties=st.booleans(),
    tensor=st.none() | NAME,
)
def test_a_manifest_is_told_whole_by_its_bytes(kind, modules, extra, tokens, ties, tensor):
    plain = tiny_manifest(kind=kind)
    adapter = msgspec.structs.replace(
        plain.adapter,
        modules=modules,
        extra_tensors=extra,
        alora_invocation_tokens=tokens,
        ties_weights=ties,
    )
    target = msgspec.structs.replace(plain.base.targets[0], tensor=tensor)
    base = msgspec.structs.replace(plain.base, targets=(target,))
    manifest = msgspec.structs.replace(plain, adapter=adapter, base=base)

    data = codec.encode(manifest)

    assert codec.decode(data) == manifest
    assert codec.encode(codec.decode(data)) == data
    assert codec.unknown_fields(json.loads(data)) == ()
    SCHEMA.validate(json.loads(data))


@given(kind=st.text(max_size=12))
def test_a_kind_is_spelt_in_one_way(kind):
    spelt = {
        first + modules + tokens
        for first in ("lora", "rslora", "dora")
        for modules in ("", "+modules")
        for tokens in ("", "+tokens")
    }

    value = json.loads(codec.encode(tiny_manifest())) | {"kind": kind}

    assert SCHEMA.is_valid(value) == (kind in spelt)
