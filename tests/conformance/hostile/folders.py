"""What may lie where a file is expected: links, pipes, pickles, pointers, nothing much."""

import io
import json
import math
import os
import pickle
import socket
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from tests.conformance.hostile.case import (
    CONFIG,
    SECRET,
    WEIGHTS,
    A,
    B,
    config,
    entries,
    fill_base,
    numbers,
    rows,
    safetensors,
    weights,
)

POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n"
    b"size 12345\n"
)


class Runs:
    """Unpickled, this writes the file `owned` where it stands."""

    def __reduce__(self) -> tuple[object, ...]:
        return (exec, ("open('owned', 'w').close()",))


def pickled(protocol: int) -> bytes:
    return pickle.dumps(Runs(), protocol) + bytes(80)


def zipped() -> bytes:
    """Return the archive that torch.save makes of such an object."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, data in (("data.pkl", pickled(2)), ("version", b"3\n")):
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), data)
    return stream.getvalue()


def tarred() -> bytes:
    """Return an archive that unpacks outside of its folder."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        archive.addfile(tarfile.TarInfo("../../owned"), io.BytesIO())
    return b"\x1f\x8b" + stream.getvalue()[2:4] + bytes(4) + stream.getvalue()[8:]


def npy() -> bytes:
    """Return an array of objects, which numpy unpickles."""
    head = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"
    head = head.ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head + pickled(2)


def polyglot() -> bytes:
    """Return a file with tensors to one reader, a zip archive to another."""
    archive = zipped()
    entry = {
        "dtype": "U8",
        "shape": [len(archive)],
        "data_offsets": [64, 64 + len(archive)],
    }
    return safetensors(entries() | {"payload": entry}, numbers() + archive)


def put(name: str, data: bytes, more: Callable[[Path], object] | None = None):
    """Return the builder of an adapter with one more file, and what `more` makes."""

    def build(folder: Path) -> None:
        (folder / "adapter" / name).write_bytes(data)
        if more:
            more(folder)

    return build


def beside(name: str, data: bytes) -> Callable[[Path], None]:
    """Return the builder of an adapter to pack, with one more file."""
    return put(name, data, fill_base)


def instead(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    """Return the builder of an adapter in which `make` puts something in a file's place."""

    def build(folder: Path) -> None:
        path = folder / "adapter" / name
        path.unlink(missing_ok=True)
        make(path)
        fill_base(folder)

    return build


def link(path: Path) -> None:
    """Make a link to a good file of that name outside of the folder."""
    outside = path.parent.parent / "outside"
    outside.mkdir(exist_ok=True)
    good = {
        CONFIG: json.dumps(config(task_type=None, revision=SECRET)).encode(),
        WEIGHTS: safetensors(entries()),
    }
    (outside / path.name).write_bytes(good.get(path.name, SECRET.encode()))
    path.symlink_to(f"../outside/{path.name}")


def only_linked(name: str) -> Callable[[Path], None]:
    """Return the builder of a folder that holds nothing but a link to others' weights."""

    def build(folder: Path) -> None:
        for path in (folder / "adapter").iterdir():
            path.unlink()
        outside = folder / "outside"
        outside.mkdir()
        factors = {
            f"unet.q.lora_{side}.weight": entries()[one]
            for side, one in (("A", A), ("B", B))
        }
        (outside / name).write_bytes(safetensors(factors))
        (folder / "adapter" / name).symlink_to(f"../outside/{name}")

    return build


def in_a_false_cache(folder: Path) -> None:
    """Make weights that are a link into blobs, and those a link to others' files."""
    fill_base(folder)
    outside = folder / "outside"
    outside.mkdir()
    path = folder / "adapter" / WEIGHTS
    path.rename(outside / "abc")
    (folder / "adapter/blobs").symlink_to("../outside")
    path.symlink_to("../adapter/blobs/abc")


def waived(make: Callable[[Path], object]) -> Callable[[Path], None]:
    """Return the builder of a case whose author waives all that is wrong with it."""

    def build(folder: Path) -> None:
        make(folder)
        for place in ("adapter", "."):
            (folder / place / "lorahub-waivers.toml").write_text(
                "".join(
                    f'[[waiver]]\nrule = "{rule}"\nwhere = "*"\nreason = "I say so"\n'
                    "until = 9999-12-31\n"
                    for rule in ("LH021", "LH065", "LH080")
                )
            )

    return build


def bind(path: Path) -> None:
    """Make a socket; its path may be longer than a socket's may."""
    before = os.getcwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as end:
            end.bind(path.name)
    finally:
        os.chdir(before)


def hole(path: Path) -> None:
    """Make a file of 60 GB without content."""
    with open(path, "wb") as stream:
        stream.truncate(60 * 10**9)


def only(name: str, data: bytes) -> Callable[[Path], None]:
    """Return the builder of an adapter whose weights are this file and no other."""

    def build(folder: Path) -> None:
        (folder / "adapter" / WEIGHTS).unlink()
        (folder / "adapter" / name).write_bytes(data)

    return build


def huge(path: str) -> Callable[[Path], None]:
    """Return the builder that puts 60 GB in the place of the first file of such a path."""

    def build(folder: Path) -> None:
        if path.startswith("base/") or not path.startswith(("package", "registry")):
            fill_base(folder)
        found = next((one for one in folder.glob(path) if one.is_file()), folder / path)
        found.unlink(missing_ok=True)
        hole(found)

    return build


TOKENIZER, LARGE = "adapter/tokenizer_config.json", "adapter/tokenizer.json"
BASE, INDEX, MOST = "base/config.json", "base/model_index.json", "at most 1048576"

# Whole matrices beside the factors.
MATRIX = {"dtype": "F32", "shape": [16, 4], "data_offsets": [64, 320]}
HEAD = {"base_model.model.lm_head.weight": MATRIX}
WHOLE = {"base_model.model.model.layers.0.mlp.down_proj.weight": MATRIX}


def names_of(count: int) -> dict[str, bytes]:
    """Return the header of so many tensors without a number, and its spelling."""
    return {
        f"t{n}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for n in range(count)
    }


def many_headers(folder: Path) -> None:
    """Make a hundred files whose headers have 3 MB each."""
    data = safetensors(names_of(45_000), b"")
    for number in range(100):
        (folder / f"adapter/x{number}.safetensors").write_bytes(data)


def many_files(folder: Path) -> None:
    for number in range(10_001):
        (folder / f"adapter/{number:05}").touch()


def gguf(fields: int, tensors: int, body: bytes) -> Callable[[Path], None]:
    """Return the builder of a GGUF file that claims so many, alone in its folder."""
    head = b"GGUF" + struct.pack("<IQQ", 3, tensors, fields)

    def build(folder: Path) -> None:
        only("x.gguf", head + body)(folder)
        (folder / "adapter" / CONFIG).unlink()

    return build


def listed(kind: int, count: int) -> bytes:
    """Return a field of a GGUF file: a list of so many zeros, or empty texts."""
    each = 8 if kind == 8 else 1
    return struct.pack("<Q1sIIQ", 1, b"k", 9, kind, count) + bytes(each * count)


def flat(rank: int) -> Callable[[Path], None]:
    """Return the builder of factors of one column and one row, and a huge rank."""
    size = 4 * rank
    header = {
        A: {"dtype": "F32", "shape": [rank, 1], "data_offsets": [0, size]},
        B: {"dtype": "F32", "shape": [1, rank], "data_offsets": [size, 2 * size]},
    }

    def build(folder: Path) -> None:
        data = struct.pack("<f", 1.0) * rank + struct.pack("<f", math.nan) * rank
        (folder / "adapter" / WEIGHTS).write_bytes(safetensors(header, data))
        (folder / "adapter" / CONFIG).write_text(json.dumps(config(r=rank)))

    return build


CASES = (
    *rows(
        "adapter",
        "strictly: LH028",
        "28 floods",
        ("a hundred headers of three megabytes", many_headers, "none is looked at"),
    ),
    *rows(
        "adapter",
        "strictly: LH023",
        "28 floods",
        ("ten thousand files beside", many_files, "none is looked at"),
    ),
    *rows(
        "adapter",
        "validate: LH021",
        "28 floods",
        (
            "GGUF with a list of twenty million numbers",
            gguf(1, 0, listed(0, 20_000_000)),
            "more than 50000 values",
        ),
        (
            "GGUF with a list of two million texts",
            gguf(1, 0, listed(8, 2_000_000)),
            "more than 50000 values",
        ),
        ("GGUF of half a million fields", gguf(500_000, 0, b""), "500000 fields"),
        ("GGUF of half a million tensors", gguf(0, 500_000, b""), "500000 tensors"),
    ),
    *rows(
        "adapter",
        "validate: LH030",
        "28 floods",
        ("factors of one column and rank 100,000", flat(100_000), "100000 of 100000"),
    ),
    *rows(
        "adapter",
        "validate: LH080",
        "20 links and devices",
        (
            "config that is a link out of the folder",
            instead(CONFIG, link),
            "out of the folder",
        ),
        ("weights that are a link out of the folder", instead(WEIGHTS, link), "out of the"),
        ("card that is a link out of the folder", instead("README.md", link), "out of the"),
        (
            "weights of another dialect that are a link out of the folder",
            only_linked("lora.safetensors"),
            "out of the",
        ),
        ("GGUF that is a link out of the folder", only_linked("lora.gguf"), "out of the"),
        (
            "waivers that came with it",
            waived(instead(CONFIG, link)),
            "these waivers are not believed",
        ),
        (
            "config that is a link to the environment",
            instead(CONFIG, lambda path: path.symlink_to("/proc/self/environ")),
            "out of the",
        ),
        (
            "weights that are a link to a device",
            instead(WEIGHTS, lambda path: path.symlink_to("/dev/zero")),
            "out of the",
        ),
    ),
    *rows(
        "adapter",
        "pack: FormatError",
        "20 links and devices",
        (
            "licence that is a link to a secret",
            instead("LICENSE", link),
            "out of the folder",
        ),
        ("tokenizer that is a link to a secret", instead("tokenizer.json", link), "out of"),
        ("card to pack that is a link to a secret", instead("README.md", link), "out of"),
        ("config to pack that is a link elsewhere", instead(CONFIG, link), "out of the"),
        ("weights to pack that are a link elsewhere", instead(WEIGHTS, link), "out of the"),
        (
            "weights to pack in a cache that is none",
            in_a_false_cache,
            "out of the",
        ),
    ),
    *rows(
        "adapter",
        "validate: LH021",
        "20 links and devices",
        ("config that is a named pipe", instead(CONFIG, os.mkfifo), "regular file"),
        ("weights that are a named pipe", instead(WEIGHTS, os.mkfifo), "regular file"),
        ("weights that are a folder", instead(WEIGHTS, Path.mkdir), "regular file"),
        ("weights that are a socket", instead(WEIGHTS, bind), "cannot be opened"),
        (
            "weights that are a link to themselves",
            instead(WEIGHTS, lambda path: path.symlink_to(WEIGHTS)),
            "",
        ),
        ("config of 60 GB, all hole", instead(CONFIG, hole), "are read"),
    ),
    *rows(
        "adapter",
        "pack: InputError",
        "20 links and devices",
        ("card that is a named pipe", instead("README.md", os.mkfifo), "regular file"),
        (
            "licence of 60 GB, all hole",
            instead("LICENSE", hole),
            "has more than 1048576 bytes",
        ),
    ),
    *rows(
        "adapter",
        "validate: LH020",
        "22 pickles",
        *(
            (
                f"pickle of protocol {protocol} under the name of the weights",
                weights(pickled(protocol)),
                "a Python pickle",
            )
            for protocol in (2, 3, 4, 5)
        ),
        (
            "pickle of protocol 0 under the name of the weights",
            weights(pickled(0)),
            "claims",
        ),
        (
            "archive of torch.save under the name of the weights",
            weights(zipped()),
            "a zip archive",
        ),
        ("array of objects under the name of the weights", weights(npy()), "a numpy array"),
        (
            "archive that unpacks elsewhere under the name of the weights",
            weights(tarred()),
            "claims",
        ),
        (
            "GGUF under the name of the weights",
            weights(b"GGUF\x03" + bytes(80)),
            "a GGUF file",
        ),
        (
            "web page under the name of the weights",
            weights(b"<!DOCTYPE html>\n<html>"),
            "a web page",
        ),
    ),
    *rows(
        "adapter",
        "validate: LH021",
        "22 pickles",
        ("pickle in a tensor of its own", weights(polyglot()), "payload"),
        ("only adapter_model.bin", only("adapter_model.bin", zipped()), "is a pickle"),
        ("only adapter_model.pt", only("adapter_model.pt", pickled(4)), "is a pickle"),
        ("config that is a pickle", put(CONFIG, pickled(4)), "UTF-8"),
    ),
    *rows(
        "adapter",
        "pack: FormatError",
        "22 pickles",
        (
            "training_args.bin beside the adapter",
            beside("training_args.bin", zipped()),
            "pickles can run code",
        ),
        (
            "pickle in capital letters",
            beside("OPTIMIZER.PT", pickled(2)),
            "pickles can run",
        ),
        (
            "pickle whose name steers the terminal",
            beside("\x1b[2J\x1b]0;owned\x07.pkl", pickled(2)),
            "pickles can run code",
        ),
    ),
    *rows(
        "adapter",
        "strictly: LH023",
        "22 pickles",
        (
            "pickle under the name of a text",
            put("notes.txt", pickled(4)),
            "this is a pickle",
        ),
    ),
    *rows(
        "adapter",
        "validate: LH013",
        "wild 14 LFS pointers",
        ("weights that are an LFS pointer", weights(POINTER), "12,345 bytes"),
        ("config that is an LFS pointer", put(CONFIG, POINTER), "12,345 bytes"),
        ("card that is an LFS pointer", put("README.md", POINTER), "12,345 bytes"),
    ),
    *rows(
        "adapter",
        "pack: InputError",
        "wild 14 LFS pointers",
        ("licence that is an LFS pointer", beside("LICENSE", POINTER), "Git LFS pointer"),
    ),
    *rows(
        "adapter",
        "validate: LH020",
        "wild 15 hardly a file",
        ("weights of two bytes", weights(b"{}"), "the file has 2 bytes"),
        ("weights of no bytes", weights(b""), "the file has 0 bytes"),
        ("weights of eight bytes", weights(bytes(8)), "does not begin with"),
    ),
    *rows(
        "adapter",
        "validate: LH021",
        "wild 15 hardly a file",
        ("weights without a tensor", weights(safetensors({}, b"")), ""),
        (
            "weights with a factor a alone",
            weights(safetensors({A: entries()[A]}, numbers()[:32])),
            "lora_B",
        ),
        (
            "weights with a factor b alone",
            weights(
                safetensors({B: entries()[B] | {"data_offsets": [0, 32]}}, numbers()[:32])
            ),
            "lora_A",
        ),
    ),
    *rows(
        "adapter",
        "validate: LH021",
        "33 hidden payload",
        (
            "whole matrix that the config does not name",
            weights(safetensors(entries() | WHOLE, numbers() + bytes(256))),
            "down_proj",
        ),
        (
            "target that the config does not name",
            weights(
                safetensors(
                    {
                        name.replace("q_proj", "o_proj"): entry
                        for name, entry in entries().items()
                    }
                )
            ),
            "q_proj",
        ),
        (
            "factors of another rank than the config's",
            weights(
                safetensors(
                    {
                        A: entries()[A] | {"shape": [1, 8]},
                        B: entries()[B] | {"shape": [8, 1]},
                    }
                )
            ),
            "rank",
        ),
        ("factors of integers", weights(safetensors(entries("I32"))), "I32"),
        (
            "quantised factors of four bits",
            weights(
                safetensors(
                    {
                        name: entry
                        | {
                            "dtype": "F4",
                            "shape": [
                                8 * size if size == 4 else size for size in entry["shape"]
                            ],
                        }
                        for name, entry in entries().items()
                    }
                )
            ),
            "F4",
        ),
    ),
    *rows(
        "adapter",
        "validate: LH030",
        "30 NaN and infinity",
        (
            "factor with a NaN",
            weights(safetensors(entries(), b"\0\0\xc0\x7f" + numbers()[4:])),
            "1 of 8 numbers",
        ),
        (
            "factor of infinities",
            weights(safetensors(entries(), numbers()[:32] + b"\0\0\x80\xff" * 8)),
            "8 of 8",
        ),
    ),
    *rows(
        "adapter",
        "pack: FormatError",
        "23 remote code",
        (
            "tokenizer that names code to run",
            beside(
                "tokenizer_config.json",
                b'{"auto_map": {"AutoTokenizer": ["evil.Tokenizer", null]}}',
            ),
            "auto_map names Python code",
        ),
    ),
    *(
        row
        for kind, expected, name, path, says in (
            ("package", "validate: LH001", "manifest", "package/lorahub.json", "4194304"),
            ("package", "validate: LH041", "signature", "package/model.sig", "1048576"),
            ("package", "verify: InputError", "bundle", "package/model.sig", "1048576"),
            ("package", "validate: LH010", "card", "package/README.md", "1048576"),
            ("package", "validate: LH010", "weights", f"package/{WEIGHTS}", "17179869184"),
            ("adapter", "validate: LH081", "tokenizer's config", TOKENIZER, "16777216"),
            ("adapter", "pack: InputError", "card", "adapter/README.md", "1048576"),
            ("adapter", "pack: InputError", "tokenizer", LARGE, "67108864"),
            ("adapter", "pack: DocumentError", "base's config", BASE, "4194304"),
            ("adapter", "pack: DocumentError", "base's index", INDEX, "4194304"),
            ("registry", "pull: IntegrityError", "config", "registry/config.json", MOST),
            ("registry", "pull: IntegrityError", "event", "registry/index/*/*/*", MOST),
            ("registry", "check: problem", "keys", "registry/keys/*/*", MOST),
            ("registry", "check: problem", "blob", "registry/blobs/*/*/*", "60000000000"),
        )
        for row in rows(
            kind,
            expected,
            "28 floods",
            (f"{name} of 60 GB, all hole ({expected.partition(':')[0]})", huge(path), says),
        )
    ),
)
