import json

import jsonschema
import msgspec
import pytest

from lora_hub import canonical
from lora_hub.errors import DocumentError
from lora_hub.manifest import codec
from lora_hub.manifest.schema import manifest_schema
from tests.builders import tiny_manifest


def test_decoding_what_was_encoded_gives_the_same_manifest():
    manifest = tiny_manifest()

    assert codec.decode(codec.encode(manifest)) == manifest


def test_encoded_manifest_follows_the_published_schema():
    value = json.loads(codec.encode(tiny_manifest()))

    jsonschema.validate(value, manifest_schema())


def test_defaults_are_left_out_of_the_bytes():
    value = json.loads(codec.encode(tiny_manifest()))

    assert "authors" not in value
    assert "policy" not in value["base"]


def changed(**fields):
    """Return the canonical bytes of a manifest with fields at paths like `base__root`."""
    value = msgspec.to_builtins(tiny_manifest())
    for path, item in fields.items():
        *parents, last = path.split("__")
        inner = value
        for parent in parents:
            inner = inner[int(parent) if parent.isdigit() else parent]
        inner[last] = item
    return canonical.encode(value)


BAD = [
    (b"[]", "the document is a list", "lorahub.json"),
    (b'{"a":1,"a":2}', "'a' stands twice", "lorahub.json"),
    (b"{}", "manifest_version is missing", "lorahub.json"),
    (
        changed(manifest_version="2.0"),
        "version '2.0' is not understood",
        "lorahub.json#/manifest_version",
    ),
    (changed() + b"\n", "not in canonical form", "lorahub.json"),
    (changed(name="Style/X"), "matching regex", "lorahub.json#/name"),
    (changed(version="1.0"), "matching regex", "lorahub.json#/version"),
    (
        changed(version="1.0." + "9" * 5000),
        "matching regex",
        "lorahub.json#/version",
    ),
    (
        changed(manifest_version="1." + "9" * 5000),
        "matching regex",
        "lorahub.json#/manifest_version",
    ),
    (changed(summary="verse\nverified"), "matching regex", "lorahub.json#/summary"),
    (changed(license="MIT\x1b[2J"), "matching regex", "lorahub.json#/license"),
    (
        b'{"manifest_version":"1.0","summary":"\\ud800"}',
        "half of a surrogate",
        "lorahub.json",
    ),
    (changed(base__root="sha256:00"), "matching regex", "lorahub.json#/base/root"),
    (changed(kind="rslora+dora"), "matching regex", "lorahub.json#/kind"),
    (changed(kind="lora+tokens+modules"), "matching regex", "lorahub.json#/kind"),
    (
        changed(adapter__modules__0__layer="rnn"),
        "invalid enum value",
        "lorahub.json#/adapter/modules/0/layer",
    ),
    (
        changed(adapter__extra_tensors=[{"name": "x", "role": "dora", "shape": [1]}]),
        "invalid enum value",
        "lorahub.json#/adapter/extra_tensors/0/role",
    ),
    (changed(base__targets=[]), "length >= 1", "lorahub.json#/base/targets"),
    (
        changed(adapter__modules__0__rank=0),
        ">= 1",
        "lorahub.json#/adapter/modules/0/rank",
    ),
    (
        changed(adapter__modules__0__scaling="alpha"),
        "invalid enum value",
        "lorahub.json#/adapter/modules/0/scaling",
    ),
    (changed(files__0__path="../x"), "matching regex", "lorahub.json#/files/0/path"),
    (changed(files__0__size=True), "expected `int`", "lorahub.json#/files/0/size"),
    (changed(created="2026-01-01"), "matching regex", "lorahub.json#/created"),
]


@pytest.mark.parametrize(("data", "problem", "where"), BAD)
def test_bad_manifest_is_refused_with_its_pointer(data, problem, where):
    with pytest.raises(DocumentError) as error:
        codec.decode(data)

    assert problem in error.value.problem
    assert error.value.where == where


def test_unknown_fields_are_reported_by_pointer_and_not_refused():
    data = changed(
        novel=1, base__colour="red", ext={"tool": {"a": 1}}, **{"x-note": "mine"}
    )

    codec.decode(data)

    assert codec.unknown_fields(json.loads(data)) == ("/base/colour", "/novel")


def test_unknown_fields_are_found_inside_lists_and_optional_documents():
    data = changed(files__0__colour="red", training={"attested": False, "mood": "good"})

    assert codec.unknown_fields(json.loads(data)) == ("/files/0/colour", "/training/mood")


def test_newer_minor_version_is_read_and_known_as_newer():
    manifest = codec.decode(changed(manifest_version="1.7"))

    assert codec.is_newer(manifest)
    assert not codec.is_newer(tiny_manifest())
