from pathlib import Path

import jsonschema
import pytest

from lora_hub.manifest import schema

SCHEMAS = Path(__file__).parents[3] / "schemas"


@pytest.mark.parametrize("name", sorted(schema.SCHEMAS))
def test_published_schema_is_the_one_of_the_types(name):
    published = (SCHEMAS / name).read_text()

    assert published == schema.text(name), "run `python -m lora_hub.manifest.schema`"


@pytest.mark.parametrize("name", sorted(schema.SCHEMAS))
def test_schema_is_valid_json_schema_2020_12(name):
    jsonschema.Draft202012Validator.check_schema(schema.SCHEMAS[name]())


def test_nothing_else_lies_among_the_schemas():
    assert {path.name for path in SCHEMAS.glob("*.json")} == set(schema.SCHEMAS)
