"""A hundred thousand changed documents: each is read, or refused by an error of ours."""

import base64
import contextlib
import json
import math
import random
import signal

import pytest
import rfc8785

from lora_hub import plain_json
from lora_hub.errors import LoraHubError
from lora_hub.formats.detect import open_adapter, source_from_files
from lora_hub.formats.dialect import ReadOptions
from lora_hub.package.package import load_source, read_package
from lora_hub.signing import envelope, keys
from lora_hub.signing.sign import sign
from lora_hub.signing.verify import verify
from lora_hub.tensors.file import TensorFile
from lora_hub.tensors.header import parse_header
from lora_hub.validation.package import check_package
from lora_hub.validation.weights import check_numbers
from tests import adapters
from tests.builders import tensor_bytes
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


def refused(documents, read):
    """Read each; return how many were refused by an error of ours. No other is let by."""
    count = 0
    for data in documents:
        try:
            read(data)
        except LoraHubError:
            count += 1
    return count


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    folder = fill_package(tmp_path_factory.mktemp("mutations"))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_twenty_thousand_headers_changed_by_bytes():
    plain = safetensors(entries() | {"__metadata__": {"format": "pt"}})

    made = each(1, 20_000, lambda rng: mutations.bytes_of(plain, rng))
    count = refused(made, lambda data: parse_header(data, len(data), where="file"))

    assert 0 < count < 20_000


def test_twenty_thousand_headers_changed_by_what_they_say():
    plain = entries() | {"__metadata__": {"format": "pt"}}

    def make(rng):
        text = mutations.text_of(mutations.value_of(plain, rng), rng)
        return safetensors(text, numbers())

    def read(data):
        file = TensorFile.from_bytes(data, where="file")
        for name in file.header.tensors:
            file.read(name)

    assert 0 < refused(each(2, 20_000, make), read) < 20_000


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

    def read(data):
        files = {CONFIG: data, WEIGHTS: weights}
        source_from_files(files.__getitem__, files, where="adapter")

    assert 0 < refused(each(3, 20_000, make), read) < 20_000


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

    def read(data):
        files = package | {"lorahub.json": data}
        load_source(read_package(files.__getitem__, files, where="package"))

    assert 0 < refused(each(4, 20_000, make), read) < 20_000


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


# ── other dialects ───────────────────────────────────────────────────────────────────

# dialect → an adapter that it can say, for the base of a language model or a pipeline
SAID = {
    "peft": (adapters.Q0, adapters.UP1),
    "mlx": (adapters.Q0, adapters.UP1),
    "loralib": (adapters.Q0, adapters.UP1),
    "gguf": (adapters.Q0, adapters.UP1),
    "kohya": (adapters.TO_Q, adapters.TEXT),
    "diffusers": (adapters.TO_Q, adapters.TEXT),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    language = adapters.language_base(folder / "language")
    pipeline = adapters.pipeline_base(folder / "pipeline")
    return {name: pipeline if name in ("kohya", "diffusers") else language for name in SAID}


def lycoris():
    """Return files of LyCORIS: a Hadamard and a Kronecker product."""
    at = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1"
    shapes = {
        **{f"{at}_to_q.hada_w{n}_{side}": shape
           for n in (1, 2) for side, shape in (("a", (8, 2)), ("b", (2, 8)))},
        **{f"{at}_to_out_0.lokr_{name}": shape
           for name, shape in (("w1", (2, 2)), ("w2_a", (4, 1)), ("w2_b", (1, 4)))},
    }  # fmt: skip
    tensors = {name: ("F32", shape) for name, shape in shapes.items()}
    tensors |= {f"{at}_{name}.alpha": ("F32", ()) for name in ("to_q", "to_out_0")}
    data = {name: b"\0\0\x80\x3f" * math.prod(s) for name, (_, s) in tensors.items()}
    return {"lora.safetensors": tensor_bytes(tensors, data)}


def changed(files, rng):
    """Return the files with one of them changed, in its header where it has one."""
    name = rng.choice(sorted(files))
    data = files[name]
    if name.endswith(".json"):
        made = mutations.text_of(mutations.value_of(json.loads(data), rng), rng)
    elif name.endswith(".safetensors") and rng.random() < 0.7:
        end = 8 + int.from_bytes(data[:8], "little")
        header = mutations.value_of(json.loads(data[8:end]), rng)
        made = safetensors(mutations.text_of(header, rng), data[end:])
    elif name.endswith(".gguf") and rng.random() < 0.9:
        # The head of some hundred bytes says what all the others mean.
        made = mutations.bytes_of(data[:600], rng) + data[600:]
    else:
        made = mutations.bytes_of(data, rng)
    return files | {name: made}


@pytest.mark.parametrize("dialect", [*SAID, "lycoris"])
def test_three_thousand_files_of_each_dialect(dialect, bases, tmp_path):
    name = "kohya" if dialect == "lycoris" else dialect
    base = bases[name]
    adapter = adapters.source(*(adapters.part(target) for target in SAID[name]))
    files = lycoris() if dialect == "lycoris" else adapters.written(name, adapter, base)
    options = ReadOptions(base=base, alpha=4.0 if name == "loralib" else None)
    folder = tmp_path / "adapter"
    folder.mkdir()

    def look(files, dialect):
        for file, data in files.items():
            (folder / file).write_bytes(data)
        with contextlib.suppress(LoraHubError):
            source = open_adapter(folder, options, dialect=dialect)
            check_numbers(source)
            return len(source.updates)

    assert look(files, name)
    assert look(files, None)
    read = 0
    for made in each(8, 3_000, lambda rng: changed(files, rng)):
        read += bool(look(made, name if read % 2 else None))
    assert 30 < read < 3_000


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
