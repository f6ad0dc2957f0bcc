"""A hundred thousand changed documents: each is read, or refused by an error of ours."""

import base64
import contextlib
import json
import random
import signal

import pytest
import rfc8785

from lora_hub import plain_json
from lora_hub.errors import LoraHubError
from lora_hub.formats.detect import source_from_files
from lora_hub.package.package import load_source, read_package
from lora_hub.signing import envelope, keys
from lora_hub.signing.sign import sign
from lora_hub.signing.verify import verify
from lora_hub.tensors.file import TensorFile
from lora_hub.tensors.header import parse_header
from lora_hub.validation.package import check_package
from tests.conformance.hostile import mutations
from tests.conformance.hostile.case import (
    CONFIG,
    WEIGHTS,
    config,
    entries,
    fill_package,
    key,
    numbers,
    safetensors,
)
from tests.conformance.hostile.signatures import bundle_of

pytestmark = pytest.mark.slow

SECONDS = 5  # of the processor; none takes a hundredth


@pytest.fixture(autouse=True)
def no_hang():
    """Give each mutation a time of its own: see `guarded`."""

    def ended(*_):
        raise AssertionError("this one hangs")

    before = signal.signal(signal.SIGPROF, ended)
    yield
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.signal(signal.SIGPROF, before)


def each(seed, count, make):
    """Yield so many changed documents; each has its time until the next is asked for."""
    rng = random.Random(seed)
    for _ in range(count):
        made = make(rng)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        yield made


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    folder = fill_package(tmp_path_factory.mktemp("mutations"))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_twenty_thousand_headers_changed_by_bytes():
    plain = safetensors(entries() | {"__metadata__": {"format": "pt"}})

    for data in each(1, 20_000, lambda rng: mutations.bytes_of(plain, rng)):
        with contextlib.suppress(LoraHubError):
            parse_header(data, len(data), where="file")


def test_twenty_thousand_headers_changed_by_what_they_say():
    plain = entries() | {"__metadata__": {"format": "pt"}}

    def make(rng):
        text = mutations.text_of(mutations.value_of(plain, rng), rng)
        return safetensors(text, numbers())

    for data in each(2, 20_000, make):
        with contextlib.suppress(LoraHubError):
            file = TensorFile.from_bytes(data, where="file")
            for name in file.header.tensors:
                file.read(name)


def test_twenty_thousand_configs():
    full = config(
        alpha_pattern={"q_proj": 4.0},
        auto_mapping=None,
        bias="none",
        exclude_modules=None,
        fan_in_fan_out=False,
        init_lora_weights=True,
        layer_replication=None,
        layers_pattern=None,
        layers_to_transform=[0],
        lora_bias=False,
        lora_dropout=0.1,
        modules_to_save=None,
        peft_version="0.21.2",
        rank_pattern={r"layers\.0.*": 2},
        revision="main",
        target_parameters=None,
        trainable_token_indices=None,
        use_dora=False,
        use_rslora=False,
    )
    weights = safetensors(entries())

    def make(rng):
        text = mutations.text_of(mutations.value_of(full, rng), rng)
        return mutations.bytes_of(text, rng) if rng.random() < 0.2 else text

    for data in each(3, 20_000, make):
        files = {CONFIG: data, WEIGHTS: weights}
        with contextlib.suppress(LoraHubError):
            source_from_files(files.__getitem__, files, where="adapter")


def test_twenty_thousand_manifests(package):
    plain = json.loads(package["lorahub.json"])

    def make(rng):
        if rng.random() < 0.2:
            return mutations.bytes_of(package["lorahub.json"], rng)
        return json.dumps(
            mutations.value_of(plain, rng),
            ensure_ascii=False,
            sort_keys=rng.random() < 0.95,
            separators=(",", ":"),
        ).encode(errors="surrogatepass")

    for data in each(4, 20_000, make):
        files = package | {"lorahub.json": data}
        with contextlib.suppress(LoraHubError):
            load_source(read_package(files.__getitem__, files, where="package"))


def test_a_thousand_manifests_give_findings_and_raise_nothing(package):
    plain = json.loads(package["lorahub.json"])

    def make(rng):
        value = mutations.value_of(plain, rng)
        return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()

    for data in each(5, 1_000, make):
        files = package | {"lorahub.json": data}

        check_package(files.__getitem__, files, lambda _: (), where="package")


def test_twenty_thousand_bundles(package):
    digests = {name: "sha256:" + "0" * 64 for name in package if name != "model.sig"}
    public = keys.public_pem(key())
    bundle = sign(digests, subject="tiny", key=key())
    outer = json.loads(bundle)
    inner = json.loads(base64.b64decode(outer["dsseEnvelope"]["payload"]))

    def make(rng):
        kind = rng.random()
        if kind < 0.4:
            return mutations.bytes_of(bundle, rng)
        if kind < 0.7:
            return mutations.text_of(mutations.value_of(outer, rng), rng)
        return bundle_of(mutations.text_of(mutations.value_of(inner, rng), rng))

    for data in each(6, 20_000, make):
        with contextlib.suppress(LoraHubError):
            verify(data, digests, [public], where="package")
            # What still counts says the same as before it was changed.
            assert envelope.parse(data).payload


def slowly(data):
    """Return the value of a document that all readers take alike, else raise ValueError."""

    def once(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key stands twice")
        return dict(pairs)

    def refuse(text):
        raise ValueError(text)

    return json.loads(data.decode(), object_pairs_hook=once, parse_constant=refuse)


def test_what_is_read_the_quick_way_says_the_same_the_slow_way(package):
    plain = json.loads(package["lorahub.json"])

    def make(rng):
        value = mutations.value_of(plain, rng)
        text = json.dumps(value, sort_keys=rng.random() < 0.8, separators=(",", ":"))
        return (
            mutations.bytes_of(text.encode(), rng) if rng.random() < 0.7 else text.encode()
        )

    read = 0
    for data in each(7, 20_000, make):
        quick = plain_json.decode(data)
        if quick is not None:
            read += 1
            assert repr(quick) == repr(slowly(data))
        if plain_json.decode_canonical(data) is not None:
            assert rfc8785.dumps(slowly(data)) == data
    assert read > 2_000
