"""Which version a reference means."""

import pytest

from lora_hub import digest, refs
from lora_hub.errors import NotFoundError
from lora_hub.registry.publish import push, yank
from lora_hub.registry.registry import Registry
from lora_hub.registry.resolve import resolve
from lora_hub.registry.stores.memory import MemoryStore
from tests.packages import KEY, PUBLIC, package

VERSIONS = ("0.9.0", "1.0.0", "1.1.0", "1.2.0", "2.0.0-rc.1", "2.0.0-rc.2")


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    registry = Registry(MemoryStore())
    folder = tmp_path_factory.mktemp("packages")
    for version in VERSIONS:
        push(package(folder / version, version=version), registry, public_key=PUBLIC)
    yank(registry, "style/tiny", "1.2.0", "too loud", KEY)
    return registry


@pytest.mark.parametrize(
    ("selector", "version"),
    [
        ("latest", "1.1.0"),
        ("1.0.0", "1.0.0"),
        ("2.0.0-rc.1", "2.0.0-rc.1"),
        ("~=1.0", "1.1.0"),
        (">=0.9,<1.1", "1.0.0"),
        ("==1.*", "1.1.0"),
        (">=2.0.0-rc.1", "2.0.0-rc.2"),
        ("<1", "0.9.0"),
    ],
)
def test_selector_means(registry, selector, version):
    resolved = resolve(refs.parse(f"style/tiny@{selector}"), registry)

    assert resolved.version == version
    assert resolved.notes == ()


def test_a_digest_means_its_package(registry):
    entry = registry.versions("style/tiny")[0]

    resolved = resolve(refs.parse(f"style/tiny@{entry.package}"), registry)

    assert (resolved.version, resolved.package) == ("0.9.0", entry.package)
    assert resolved.signature == entry.event.signature
    assert resolved.size_bytes == entry.event.size_bytes


def test_a_withdrawn_version_named_exactly_comes_with_a_warning(registry):
    entry = registry.versions("style/tiny")[3]

    for selector in ("1.2.0", entry.package):
        resolved = resolve(refs.parse(f"style/tiny@{selector}"), registry)

        assert resolved.version == "1.2.0"
        assert resolved.notes == ("style/tiny 1.2.0 was withdrawn: too loud",)


@pytest.mark.parametrize(
    "selector", ["3.0.0", "~=3.0", "==1.2.*", ">=2", digest.of_bytes(b"")]
)
def test_says_what_there_is_where_nothing_satisfies(registry, selector):
    with pytest.raises(NotFoundError, match="no version satisfies") as caught:
        resolve(refs.parse(f"style/tiny@{selector}"), registry)

    assert caught.value.hint == (
        "versions: 0.9.0, 1.0.0, 1.1.0, 1.2.0 (withdrawn), 2.0.0-rc.1, 2.0.0-rc.2"
    )


def test_latest_is_no_pre_release(tmp_path):
    registry = Registry(MemoryStore())
    push(package(tmp_path / "p", version="1.0.0-rc.1"), registry, public_key=PUBLIC)

    with pytest.raises(NotFoundError, match="only pre-releases"):
        resolve(refs.parse("style/tiny"), registry)


def test_latest_is_no_withdrawn_version(tmp_path):
    registry = Registry(MemoryStore())
    push(package(tmp_path / "p"), registry, public_key=PUBLIC)
    yank(registry, "style/tiny", "1.0.0", "broken", KEY)

    with pytest.raises(NotFoundError, match="every version was withdrawn"):
        resolve(refs.parse("style/tiny"), registry)
