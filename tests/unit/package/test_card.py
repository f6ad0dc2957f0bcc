from lora_hub.package.card import write_card

FACTS = {
    "full_name": "style/verse",
    "summary": "writes verse",
    "license_expression": "Apache-2.0",
    "task": "text-generation/verse",
    "base_name": "org/model",
}


def test_front_matter_states_the_facts_of_the_package():
    card = write_card(**FACTS, languages=["en", "la"])

    assert card == (
        "---\n"
        'base_model: "org/model"\n'
        "base_model_relation: adapter\n"
        'language: ["en", "la"]\n'
        "library_name: peft\n"
        "license: apache-2.0\n"
        "pipeline_tag: text-generation\n"
        "tags: [lora, lora-hub]\n"
        "---\n\n# style/verse\n\nwrites verse\n"
    )


def test_front_matter_of_the_author_is_replaced_and_his_words_stay():
    body = "\ufeff---\r\nbase_model: another/one\r\n---\r\n# Mine\n\n---\n\nsecond part\n"

    card = write_card(**FACTS, body=body)

    assert "another/one" not in card
    assert card.endswith("---\n\n# Mine\n\n---\n\nsecond part\n")


def test_licence_that_hubs_do_not_know_is_named_beside():
    card = write_card(**FACTS | {"license_expression": "MIT OR ISC"})

    assert 'license: other\nlicense_name: "MIT OR ISC"\n' in card


def test_base_on_no_hub_is_not_named():
    assert "base_model:" not in write_card(**FACTS | {"base_name": None})
