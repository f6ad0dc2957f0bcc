"""Finding names in the index."""

import pytest

from lora_hub import digest
from lora_hub.registry.publish import push, yank
from lora_hub.registry.registry import Registry
from lora_hub.registry.search import search
from lora_hub.registry.stores.memory import MemoryStore
from tests.packages import KEY, PUBLIC, package


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    registry = Registry(MemoryStore())
    folder = tmp_path_factory.mktemp("packages")
    for name, version, fields in (
        ("style/verse", "1.0.0", {"summary": "Old verse."}),
        ("style/verse", "1.1.0", {"summary": "Writes Verse."}),
        ("style/prose", "1.0.0", {"base": "another"}),
        ("tools/sql", "1.0.0", {"task": "text-generation/sql"}),
        ("tools/tags", "1.0.0", {"task": "token-classification"}),
        ("tools/gone", "1.0.0", {}),
    ):
        made = package(folder / f"{name}-{version}", name=name, version=version, **fields)
        push(made, registry, public_key=PUBLIC)
    yank(registry, "tools/gone", "1.0.0", "broken", KEY)
    return registry


def names(entries):
    return [f"{entry.full_name} {entry.version}" for entry in entries]


def test_without_conditions_lists_the_highest_of_every_name(registry):
    assert names(search(registry)) == [
        "style/prose 1.0.0",
        "style/verse 1.1.0",
        "tools/sql 1.0.0",
        "tools/tags 1.0.0",
    ]


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["verse", "WRITES"], ["style/verse 1.1.0"]),
        (["tools", "q_proj"], ["tools/sql 1.0.0", "tools/tags 1.0.0"]),
        (["nothing"], []),
    ],
)
def test_every_word_must_stand_somewhere(registry, words, found):
    assert names(search(registry, words)) == found


def test_by_base(registry):
    root = digest.of_bytes(b"another")

    assert names(search(registry, base_root=root)) == ["style/prose 1.0.0"]


def test_by_task_with_and_without_its_free_part(registry):
    assert names(search(registry, task="text-generation/sql")) == ["tools/sql 1.0.0"]
    assert len(search(registry, task="text-generation")) == 3
    assert names(search(registry, task="token-classification")) == ["tools/tags 1.0.0"]


def test_by_rank(registry):
    assert search(registry, max_rank=1) == ()
    assert len(search(registry, max_rank=2)) == 4
