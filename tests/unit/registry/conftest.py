"""A registry in memory with a package in it, and what a client keeps on its disk."""

import pytest

from lora_hub.registry.cache import Cache
from lora_hub.registry.publish import push
from lora_hub.registry.registry import Registry
from lora_hub.registry.stores.memory import MemoryStore
from lora_hub.registry.trust import TrustStore
from tests.packages import PUBLIC, package


@pytest.fixture
def registry():
    return Registry(MemoryStore())


@pytest.fixture
def made(registry, tmp_path):
    made = package(tmp_path / "package")
    push(made, registry, public_key=PUBLIC)
    return made


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache")


@pytest.fixture
def trust(tmp_path):
    return TrustStore(tmp_path / "trust", strict=False)
