"""One thing in an adapter's files is changed: it is refused by name, or means the same.

The numbers are such that every dtype holds them, so that a tensor in another dtype is the
same tensor. What a file means is computed here in plain numpy, not by the product.
"""

import contextlib
import functools
import json
import struct

import numpy as np
import pytest
from safetensors.torch import save_file

from lora_hub import extras
from lora_hub.base.pipeline import open_base
from lora_hub.base.structure import check_structure
from lora_hub.errors import LoraHubError
from lora_hub.formats import gguf_file
from lora_hub.formats.detect import DIALECTS
from lora_hub.formats.dialect import Given, ReadOptions
from lora_hub.formats.matrices import Matrix
from tests import adapters, peft_zoo
from tests.adapters import CONV, EMBEDDING, GATE_UP, K0, PIPELINE, Q0, SWITCH

FLOATS = ("F16", "BF16", "F32", "F64")
WHOLE = {"I32": "<i4", "I16": "<i2"}
CASES = sorted(peft_zoo.CASES)


# ── adapters ─────────────────────────────────────────────────────────────────────────


def parts(targets, **more):
    return [adapters.part(target, **more) for target in targets]


# dialect, which base, the factors, what the reader must be told
WRITTEN = {
    "mlx": ("mlx", "language", parts([Q0, K0]), {}),
    "mlx dora": ("mlx", "language", parts([Q0, K0], dora=True), {}),
    "mlx experts": ("mlx", None, parts([SWITCH], layer="experts", experts=2), {}),
    "kohya": ("kohya", "pipeline", parts(PIPELINE), {}),
    "kohya dora": ("kohya", "pipeline", parts(PIPELINE, dora=True), {}),
    "kohya convolution": (
        "kohya",
        "pipeline",
        [*parts(PIPELINE[:1]), *parts([CONV], layer="conv")],
        {},
    ),
    "diffusers": ("diffusers", "pipeline", parts(PIPELINE), {}),
    "diffusers with biases": ("diffusers", "pipeline", parts(PIPELINE, bias=True), {}),
    "loralib": ("loralib", "language", parts([Q0, K0]), {"alpha": 4.0}),
    "loralib embedding": (
        "loralib",
        "language",
        [*parts([Q0]), *parts([EMBEDDING], layer="embedding")],
        {"alpha": 4.0},
    ),
    "gguf": ("gguf", "language", parts([Q0, K0]), {}),
    "gguf experts": (
        "gguf",
        "experts",
        [*parts([Q0]), *parts([GATE_UP], layer="experts", experts=2)],
        {},
    ),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    pipeline = adapters.pipeline_base(folder / "pipeline")
    index = {name: ["diffusers", "Model"] for name in ("unet", "text_encoder")}
    (pipeline / "model_index.json").write_text(json.dumps(index))
    for component in index:
        (pipeline / component / "config.json").write_text("{}")
    return {
        "language": adapters.language_base(folder / "language"),
        "experts": adapters.language_base(folder / "experts", model_type="mixtral"),
        "pipeline": pipeline,
        None: None,
    }


class Files:
    """An adapter's files, and how they are read: tensors can be exchanged."""

    def __init__(self, dialect, files, base=None, fits=None, **options):
        self.row = DIALECTS[dialect]
        self.config = json.loads(files.get("adapter_config.json", b"{}"))
        self.options = ReadOptions(base=base, **options)
        self.fits = fits
        data = files[self.row.weights_name]
        self.metadata, self.tensors = {}, {}
        if dialect == "gguf":
            library = extras.require("gguf", extra="demo")
            fields, held = gguf_file.contents(library, data, "weights")
            self.encode = lambda tensors: gguf_file.encode(
                library,
                fields["general.architecture"],
                fields["adapter.lora.alpha"],
                {name: Matrix(*whole) for name, whole in tensors.items()},
            )
            held = {n: (w.dtype, w.shape, bytes(w.data)) for n, w in held.items()}
        else:
            self.metadata = adapters.metadata_of(data) or {}
            self.encode = lambda tensors: safetensors(tensors, self.metadata)
            held = adapters.tensors_of(data)
        self.tensors = {name: rounded(*whole, name) for name, whole in held.items()}

    def read(self, tensors=None, config=None):
        """Return what the files mean; the product's error is raised."""
        source = self.row.read(
            Given(
                where="adapter",
                weights_name=self.row.weights_name,
                weights=self.encode(self.tensors if tensors is None else tensors),
                config=self.config if config is None else config,
            ),
            self.options,
        )
        if self.fits:
            with open_base(self.fits) as view:
                check_structure(source, view)
        return meaning(source)


def safetensors(tensors, metadata):
    header, body = {"__metadata__": metadata} if metadata else {}, b""
    for name, (dtype, shape, data) in sorted(tensors.items()):
        at = [len(body), len(body) + len(data)]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": at}
        body += data
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body


def rounded(dtype, shape, data, name):
    """Return the tensor in numbers of two bits, none of them zero; alphas as they are."""
    if dtype not in FLOATS or name.endswith("alpha"):
        return dtype, shape, data
    values = adapters.float64(dtype, shape, data)
    values = np.where(values < 0, -1, 1) * (np.round(np.abs(values) * 4) % 4 + 1) / 4
    return dtype, shape, stored(values, dtype)


def stored(values, dtype):
    if dtype in WHOLE:
        return values.astype(WHOLE[dtype]).tobytes()
    if dtype == "BF16":
        return (values.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    return values.astype({"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype]).tobytes()


# ── what they mean ───────────────────────────────────────────────────────────────────


def meaning(source):
    """Return everything that the adapter does, as numbers in float64."""

    def numbers(info):
        return adapters.float64(info.dtype, info.shape, source.tensors.read(info.name))

    found = {"": (source.alora_tokens, source.ties_weights)}
    for update in source.updates:
        a, b, rank = numbers(update.a), numbers(update.b), update.rank
        if update.layer == "experts":
            a, b = a.reshape(-1, rank, a.shape[1]), b.reshape(len(b), rank, -1)
            delta = np.einsum("ork,kri->koi", b, a)
        elif update.layer == "conv" and b.shape[1] != rank:
            # In groups: factors in place of their product.
            delta = np.concatenate([a.ravel(), b.ravel(), a.shape, b.shape])
        else:
            delta = np.tensordot(b.reshape(len(b), -1), a, 1)
        more = [numbers(one).ravel() for one in update.tensors[2:]]
        kinds = (update.layer, update.magnitude is None, update.bias is None)
        found["update", update.target] = (*kinds, update.scaling * delta, *more)
    for scale in source.scales:
        found["scale", scale.target] = (scale.axis, numbers(scale.vector).ravel())
    for new in source.replacements:
        found["new", new.name] = (new.rows, numbers(new.tensor))
    return found


def is_same(one, other):
    return one.keys() == other.keys() and all(
        len(one[key]) == len(other[key])
        and all(map(np.array_equal, map(as_array, one[key]), map(as_array, other[key])))
        for key in one
    )


def as_array(value):
    return value if isinstance(value, np.ndarray) else np.array(value, dtype=object)


# ── changes ──────────────────────────────────────────────────────────────────────────


def tensor_changes(tensors, *, with_sizes):
    """Give what is done, and the tensors after it."""
    some = next(iter(tensors.values()))
    for extra in extras_beside(tensors):
        yield f"add {extra}", tensors | {extra: some}
    for name, (dtype, shape, data) in tensors.items():
        others = {key: value for key, value in tensors.items() if key != name}
        yield f"delete {name}", others
        for new in renamed(name):
            if new and new not in tensors:
                yield f"rename {name} to {new}", others | {new: (dtype, shape, data)}
        if dtype not in FLOATS:
            continue
        values = adapters.float64(dtype, shape, data)
        for other in sorted({*FLOATS, *WHOLE} - {dtype}):
            yield (
                f"{name} as {other}",
                tensors | {name: (other, shape, stored(values, other))},
            )
        for new in reshaped(values):
            # Only a base tells how large a layer is.
            if new.shape != tuple(shape) and (with_sizes or new.size == values.size):
                changed = (dtype, new.shape, stored(new, dtype))
                yield f"{name} as {list(new.shape)}", tensors | {name: changed}


def extras_beside(tensors):
    first = min(tensors)
    stem = first.rpartition(".")[0]
    return (
        "extra",
        "model.norm.weight",
        f"{first}.extra",
        f"{stem}.lora_C.weight",
        f"{stem}.lora_A.default.weight",
        f"{stem}.alpha.alpha",
        "base_model.model.extra.lora_A.weight",
        "lora_unet_extra.lora_down.weight",
        "unet.extra.lora.down.weight",
        "extra.lora_a",
    )


def renamed(name):
    return {
        f"{name}.extra",
        f"extra.{name}",
        name[:-1],
        name.replace("lora_A", "lora_B"),
        name.replace("lora_A", "lora_X"),
        name.replace("lora_down", "lora_up"),
        name.replace("_a", "_b"),
        name.upper(),
        name.replace(".weight", ""),
    } - {name}


def reshaped(values):
    yield values.reshape(-1)
    yield values[None]
    yield values[..., None]
    yield values.T
    if values.ndim:
        yield values[:-1]
        yield values[..., :-1]
        yield values[:0]
        yield np.concatenate([values, values[:1]])


# ── laws ─────────────────────────────────────────────────────────────────────────────


def not_noticed(files):
    """Return the changes of a tensor after which something else is read, in silence."""
    was = files.read()
    found = []
    for change, tensors in tensor_changes(files.tensors, with_sizes=bool(files.fits)):
        with contextlib.suppress(LoraHubError):
            now = files.read(tensors)
            if not is_same(was, now) and not is_less(change, was, now):
                found.append(change)
    return found


def is_less(change, was, now):
    """Return whether a thing is gone that no file says was there.

    No format lists the biases and the embeddings it brings anew, and the magnitudes of
    LyCORIS stand where they stand. Nothing else may differ then.
    """
    if not change.startswith("delete "):
        return False
    if change.endswith(".dora_scale"):
        return was.keys() == now.keys()
    gone = was.keys() - now.keys()
    kinds = {kind[0] for kind in gone} if gone else set()
    # Without the weight that was tied, nothing is.
    left = now.keys() - {""}
    return kinds == {"new"} and is_same(
        {key: was[key] for key in left}, {key: now[key] for key in left}
    )


@pytest.mark.parametrize("name", WRITTEN)
def test_a_changed_tensor_of_any_dialect_is_refused_or_means_the_same(name, bases):
    files = of_dialect(name, bases)

    assert not not_noticed(files)


def of_dialect(name, bases):
    dialect, base, held, options = WRITTEN[name]
    written = adapters.written(dialect, adapters.source(*held), bases[base])
    fits = None if dialect == "gguf" and base == "experts" else bases[base]
    return Files(dialect, written, bases[base], fits, **options)


@functools.cache
def folder_of(name, root):
    case = peft_zoo.CASES[name]
    folder, base = root / name / "adapter", root / name / "base"
    peft_zoo.save(case, folder)
    model = peft_zoo.model(case)
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(base)
    else:
        base.mkdir()
        save_file(model.state_dict(), base / "model.safetensors")
    return folder, base


def of_peft(name, root):
    folder, base = folder_of(name, root)
    held = {path.name: path.read_bytes() for path in folder.iterdir()}
    return Files("peft", held, fits=base)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("zoo")


@pytest.mark.parametrize("name", CASES)
def test_a_changed_tensor_of_peft_is_refused_or_means_the_same(name, root):
    assert not not_noticed(of_peft(name, root))


# Keys that say what the adapter does and nothing else does: with another value it is
# another adapter, and without one PEFT's default holds.
SAYING = {
    "alora_invocation_tokens",
    "alpha_pattern",
    "ensure_weight_tying",
    "lora_alpha",
    "scale",
    "use_rslora",
}


def config_changes(config):
    """Give what is done, the key, its new value, and the config after it."""
    yield "add not_known", "not_known", True, config | {"not_known": True}
    for key, value in config.items():
        others = {name: held for name, held in config.items() if name != key}
        yield f"delete {key}", key, None, others
        yield f"rename {key}", f"{key}_", value, others | {f"{key}_": value}
        for other in (None, "other", 7, -1, 0.5, True, [], ["other"], {}, {"other": 1}):
            if (type(other), other) != (type(value), value):
                yield f"{key} = {other!r}", key, other, config | {key: other}


def configs_not_noticed(files, changes):
    was = files.read()
    found = []
    for change, key, value, config in changes:
        with contextlib.suppress(LoraHubError):
            now = files.read(config=config)
            if not is_same(was, now) and not is_said(key, value, files.config):
                found.append(change)
    return found


def is_said(key, value, config):
    """Return whether such a value is one that says something else."""
    if key in ("target_modules", "modules_to_save") and config.get("ensure_weight_tying"):
        return True  # nothing is tied that is not named
    old = config.get("lora_parameters", config).get(key)
    is_number = type(value) in (int, float) and type(old) in (int, float)
    return key in SAYING and (
        value is None or is_number or value == [] or type(value) is type(old)
    )


@pytest.mark.parametrize("name", CASES)
def test_a_changed_config_of_peft_is_refused_or_means_the_same(name, root):
    files = of_peft(name, root)

    assert not configs_not_noticed(files, config_changes(files.config))


@pytest.mark.parametrize("name", ["mlx", "mlx dora", "mlx experts"])
def test_a_changed_config_of_mlx_is_refused_or_means_the_same(name, bases):
    files = of_dialect(name, bases)
    inner = [
        (change, key, value, files.config | {"lora_parameters": changed})
        for change, key, value, changed in config_changes(files.config["lora_parameters"])
    ]

    assert not configs_not_noticed(files, [*config_changes(files.config), *inner])
