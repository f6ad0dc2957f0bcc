"""From a reference to a verified folder; every lie of a registry on the way."""

import pytest

from lora_hub import refs
from lora_hub.errors import IntegrityError, NotFoundError, TrustError
from lora_hub.package.package import load_source
from lora_hub.registry import documents
from lora_hub.registry.fetch import fetch
from lora_hub.registry.publish import push, yank
from lora_hub.registry.pull import pull
from lora_hub.registry.registry import Registry, blob_path
from lora_hub.registry.resolve import resolve
from lora_hub.registry.stores.memory import MemoryStore
from lora_hub.signing import keys
from tests.packages import KEY, another_key, package

REFERENCE = refs.parse("style/tiny")


class CountingStore(MemoryStore):
    """Counts what is read."""

    def __init__(self):
        super().__init__()
        self.reads = []

    def read(self, path, *, max_bytes=None):
        self.reads.append(path)
        return super().read(path, max_bytes=max_bytes)


@pytest.fixture
def registry():
    return Registry(CountingStore())


def contents(package):
    return {name: package.read(name) for name in package.names}


def overwrite(registry, digest, data):
    registry.store.write(blob_path(digest), [data], if_absent=False)


def test_brings_every_byte_and_says_who_signed(registry, made, cache, trust):
    pulled = pull(REFERENCE, registry, cache, trust)

    assert {path.name: path.read_bytes() for path in pulled.folder.iterdir()} == {
        name: made.read(name) for name in made.names
    }
    assert pulled.package.digest == made.digest
    assert pulled.signer.hint == keys.hint(KEY)
    assert "first contact" in pulled.notes[0]


def test_what_the_cache_has_is_not_asked_for_again(registry, made, cache):
    resolved = resolve(REFERENCE, registry)
    first = fetch(resolved, registry, cache)
    registry.store.reads.clear()

    again = fetch(resolved, registry, cache)

    assert again.folder == first.folder
    assert contents(again.package) == contents(first.package)
    assert registry.store.reads == []


def test_a_pull_reads_each_blob_once_and_using_the_package_none(
    registry, made, cache, trust
):
    registry.store.reads.clear()

    pulled = pull(REFERENCE, registry, cache, trust)
    load_source(pulled.package)

    blobs = [path for path in registry.store.reads if path.startswith("blobs/")]
    assert sorted(blobs) == sorted(registry.store.list("blobs"))


@pytest.mark.parametrize("times", [1, 2], ids=["cold", "from the cache"])
def test_what_was_verified_is_used_whatever_becomes_of_the_folder(
    registry, made, cache, trust, times
):
    for _ in range(times):
        pulled = pull(REFERENCE, registry, cache, trust)

    for path in pulled.folder.iterdir():
        path.chmod(0o644)
        path.write_bytes(b"something else")

    source = load_source(pulled.package)
    name = source.updates[0].a.name
    assert source.tensors.read(name) == load_source(made).tensors.read(name)
    assert contents(pulled.package) == contents(made)


def test_says_that_a_version_was_withdrawn(registry, made, cache, trust):
    yank(registry, "style/tiny", "1.0.0", "too loud", KEY)

    pulled = pull(refs.parse("style/tiny@1.0.0"), registry, cache, trust)

    assert pulled.notes[0] == "style/tiny 1.0.0 was withdrawn: too loud"


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "README.md"])
def test_a_changed_file_never_reaches_the_cache(registry, made, cache, trust, name):
    data = bytearray(made.read(name))
    data[len(data) // 2] ^= 1
    overwrite(registry, made.entry(name).sha256, bytes(data))

    with pytest.raises(IntegrityError):
        pull(REFERENCE, registry, cache, trust)

    assert cache.list() == ()
    assert trust.get("style") is None


def test_a_changed_manifest_or_signature_never_reaches_the_cache(
    registry, made, cache, trust
):
    signature = registry.versions("style/tiny")[0].event.signature
    for digest in (made.digest, signature):
        good = registry.store.read(blob_path(digest))
        overwrite(registry, digest, good.replace(b"a", b"b", 1))

        with pytest.raises(IntegrityError):
            pull(REFERENCE, registry, cache, trust)

        overwrite(registry, digest, good)
    assert cache.list() == ()


def test_a_lost_file_is_told(registry, made, cache, trust):
    registry.store.delete(blob_path(made.entry("README.md").sha256))

    with pytest.raises(NotFoundError, match="no such file"):
        pull(REFERENCE, registry, cache, trust)


def forge(registry, path, **fields):
    """Change the last event of a name; nothing follows it that would tell."""
    value = documents.strict_json.decode(registry.store.read(path), where=path) | fields
    registry.store.write(path, [documents.canonical.encode(value)], if_absent=False)


def test_one_package_under_the_name_of_another_is_told(
    registry, made, cache, trust, tmp_path
):
    other = package(tmp_path / "other", name="style/other")
    push(other, registry)
    forge(
        registry,
        "index/style/tiny/000001.json",
        package=other.digest,
        signature=registry.versions("style/other")[0].event.signature,
    )

    for _ in range(2):  # cold, and with the package in the cache
        with pytest.raises(IntegrityError, match="the package itself style/other"):
            pull(REFERENCE, registry, cache, trust)
        pull(refs.parse("style/other"), registry, cache, trust)


def test_the_signature_of_another_package_is_told(registry, made, cache, trust, tmp_path):
    other = package(tmp_path / "other", name="style/other")
    push(other, registry)
    signature = registry.versions("style/other")[0].event.signature
    forge(registry, "index/style/tiny/000001.json", signature=signature)

    with pytest.raises(IntegrityError, match="changed after signing"):
        pull(REFERENCE, registry, cache, trust)


def test_a_package_by_a_stranger_is_not_believed(registry, made, cache, trust, tmp_path):
    """Whoever owns the store can write any event, and still signs nothing."""
    trust.check("style", registry)
    stranger = another_key()
    elsewhere = Registry(CountingStore())
    foreign = package(tmp_path / "foreign", version="9.0.0", key=stranger)
    push(foreign, elsewhere, public_key=keys.public_pem(stranger))
    for path in elsewhere.store.list("blobs"):
        registry.store.write(path, [elsewhere.store.read(path)], if_absent=True)
    event = elsewhere.store.read("index/style/tiny/000001.json")
    registry.store.write("index/style/tiny/000001.json", [event], if_absent=False)

    with pytest.raises(TrustError, match="signed with another key"):
        pull(REFERENCE, registry, cache, trust)


def test_a_bad_package_pins_nothing(registry, made, cache, trust, tmp_path):
    other = package(tmp_path / "other", name="style/other")
    push(other, registry)
    signature = registry.versions("style/other")[0].event.signature
    forge(registry, "index/style/tiny/000001.json", signature=signature)

    with pytest.raises(IntegrityError):
        pull(REFERENCE, registry, cache, trust)

    assert trust.get("style") is None


def test_a_manifest_changed_in_the_cache_is_told(registry, made, cache, trust):
    folder = pull(REFERENCE, registry, cache, trust).folder
    manifest = folder / "lorahub.json"
    manifest.chmod(0o644)
    manifest.write_bytes(made.manifest_bytes.replace(b"A tiny", b"A tidy"))

    with pytest.raises(IntegrityError, match="expected sha256") as caught:
        pull(REFERENCE, registry, cache, trust)

    assert "lorahub cache prune" in caught.value.hint


def test_weights_changed_in_the_cache_are_told(registry, made, cache, trust):
    folder = pull(REFERENCE, registry, cache, trust).folder
    weights = folder / "adapter_model.safetensors"
    weights.chmod(0o644)
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")

    with pytest.raises(IntegrityError) as caught:
        pull(REFERENCE, registry, cache, trust)

    assert caught.value.where == str(weights)
    assert "cache prune" in caught.value.hint


@pytest.mark.parametrize("name", ["README.md", "adapter_config.json"])
def test_any_file_changed_in_the_cache_is_told(registry, made, cache, trust, name):
    """The smallest ones too, although nothing of them acts on a model."""
    file = pull(REFERENCE, registry, cache, trust).folder / name
    file.chmod(0o644)
    file.write_bytes(file.read_bytes().replace(b"t", b"x", 1))

    with pytest.raises(IntegrityError, match="the bytes have digest") as caught:
        pull(REFERENCE, registry, cache, trust)

    assert caught.value.where == str(file)


def test_a_file_added_or_removed_in_the_cache_is_told(registry, made, cache, trust):
    folder = pull(REFERENCE, registry, cache, trust).folder
    (folder / "vocab.txt").write_text("a")
    with pytest.raises(IntegrityError, match="the file was added"):
        pull(REFERENCE, registry, cache, trust)

    (folder / "vocab.txt").unlink()
    (folder / "README.md").unlink()
    with pytest.raises(IntegrityError, match="the file is missing"):
        pull(REFERENCE, registry, cache, trust)


def test_a_signature_changed_in_the_cache_is_told(registry, made, cache, trust):
    signature = pull(REFERENCE, registry, cache, trust).folder / "model.sig"
    signature.chmod(0o644)
    signature.write_bytes(signature.read_bytes().replace(b"A", b"B", 1))

    with pytest.raises(TrustError):
        pull(REFERENCE, registry, cache, trust)


def test_a_signature_removed_in_the_cache_is_told(registry, made, cache, trust):
    (pull(REFERENCE, registry, cache, trust).folder / "model.sig").unlink()

    with pytest.raises(TrustError, match="not signed"):
        pull(REFERENCE, registry, cache, trust)
