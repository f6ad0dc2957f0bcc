"""Safetensors files that readers take differently, or that cost more than they hold."""

import json
from pathlib import Path

from tests.conformance.hostile.case import (
    WEIGHTS,
    A,
    B,
    entries,
    numbers,
    rows,
    safetensors,
    weights,
)

ZEROS = [0, 0]


def changed(name: str, **fields: object) -> bytes:
    """Return the adapter's file with fields of one entry changed."""
    header = entries()
    header[name] = header[name] | fields
    return safetensors(header)


def more(name: str, entry: object = None) -> bytes:
    """Return the adapter's file with one more entry in its header."""
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [64, 64]}
    return safetensors(entries() | {name: entry or empty})


def text(old: str, new: str) -> bytes:
    """Return the adapter's file with a piece of its header's text replaced."""
    plain = json.dumps(entries())
    assert old in plain
    return safetensors(plain.replace(old, new, 1).encode())


def twice() -> bytes:
    """Return the adapter's file, which names B before and behind A."""
    plain = json.dumps(entries())
    other = json.dumps(entries()[B] | {"data_offsets": [0, 32]})
    return safetensors(f"{{{json.dumps(B)}: {other}, {plain[1:]}".encode())


def flood(count: int) -> bytes:
    """Return a file of so many tensors without a number."""
    entry = '{"dtype":"F32","shape":[0],"data_offsets":[64,64]}'
    many = ",".join(f'"t{index}":{entry}' for index in range(count))
    return safetensors(f"{json.dumps(entries())[:-1]},{many}}}".encode())


def sparse(folder: Path) -> None:
    """Make a file of a full header's length and nothing else, 60 GB of hole."""
    with open(folder / "adapter" / WEIGHTS, "wb") as stream:
        stream.write((1 << 32).to_bytes(8, "little") + b"{")
        stream.truncate(60 * 10**9)


def hole(folder: Path) -> None:
    """Make a well-formed file of 60 GB that takes four kilobytes of the disk."""
    rank, size = 1 << 16, 57_000
    header = {
        A: {"dtype": "F32", "shape": [rank, size], "data_offsets": [0, 4 * rank * size]},
        B: {
            "dtype": "F32",
            "shape": [size, rank],
            "data_offsets": [4 * rank * size, 8 * rank * size],
        },
    }
    with open(folder / "adapter" / WEIGHTS, "wb") as stream:
        stream.write(safetensors(header, b""))
        stream.truncate(stream.tell() + 8 * rank * size)


# An entry whose data lie on those of B.
SAME = {"dtype": "F32", "shape": [4, 2], "data_offsets": [32, 64]}

CASES = (
    *rows(
        "adapter",
        "validate: LH020",
        "24 huge header",
        (
            "header of 2**63 bytes",
            weights((1 << 63).to_bytes(8, "little") + b"{}"),
            "claims 92",
        ),
        (
            "header of 2**64 - 1 bytes",
            weights(b"\xff" * 8 + b"{}"),
            "claims 18446744073709",
        ),
        (
            "header longer than the file",
            weights(safetensors(entries(), length=4000)),
            "claims",
        ),
        (
            "header of nine million spaces",
            weights(safetensors(json.dumps(entries()).encode() + b" " * 9_000_000)),
            "at most 8388608 are read",
        ),
        (
            "metadata of ten megabytes",
            weights(safetensors({"__metadata__": {"a": "b" * 10_000_000}} | entries())),
            "at most 8388608 are read",
        ),
        ("header length in a sparse file of 60 GB", sparse, "at most 8388608 are read"),
    ),
    *rows(
        "adapter",
        "validate: LH020",
        "25 duplicate keys",
        ("tensor named twice", weights(twice()), "stands twice"),
        (
            "tensor named twice with an escape",
            weights(safetensors(twice()[8:-64].replace(b', "base', b', "\\u0062ase'))),
            "stands twice",
        ),
        (
            "field given twice",
            weights(text('"dtype": "F32"', '"dtype": "F16", "dtype": "F32"')),
            "'dtype' stands twice",
        ),
        (
            "metadata given twice",
            weights(text("{", '{"__metadata__": {}, "__metadata__": {}, ')),
            "stands twice",
        ),
        (
            "metadata key given twice",
            weights(text("{", '{"__metadata__": {"a": "b", "a": "c"}, ')),
            "stands twice",
        ),
    ),
    *rows(
        "adapter",
        "validate: LH020",
        "26 overlap and holes",
        ("two tensors on the same bytes", weights(more("again", SAME)), "overlaps"),
        (
            "tensors that overlap by half",
            weights(changed(B, data_offsets=[16, 48])),
            "overlaps",
        ),
        (
            "hole at the start",
            weights(safetensors({A: entries()[A] | {"data_offsets": [8, 40]}}, bytes(40))),
            "leaves a hole",
        ),
        (
            "hole between tensors",
            weights(
                safetensors(
                    entries() | {B: entries()[B] | {"data_offsets": [40, 72]}}, bytes(72)
                )
            ),
            "leaves a hole",
        ),
        (
            "tensor beyond the end",
            weights(safetensors(entries(), numbers()[:48])),
            "48 follow",
        ),
        ("begin behind end", weights(changed(B, data_offsets=[64, 32])), "begins at 64"),
        (
            "payload behind the tensors",
            weights(safetensors(entries(), numbers() + b"#!/bin/sh")),
            "9 bytes follow the last tensor",
        ),
        (
            "zip archive behind the tensors",
            weights(safetensors(entries(), numbers() + b"PK\x05\x06" + bytes(18))),
            "22 bytes follow the last tensor",
        ),
        (
            "offsets that span too little",
            weights(changed(B, data_offsets=[32, 60])),
            "span 28",
        ),
    ),
    *rows(
        "adapter",
        "validate: LH020",
        "27 numbers that are none",
        ("negative dimension", weights(changed(B, shape=[-4, -2])), "shape holds -4"),
        ("dimension with a point", weights(text("[4, 2]", "[4.0, 2]")), "shape holds 4.0"),
        (
            "dimension with an exponent",
            weights(text("[4, 2]", "[4e0, 2]")),
            "shape holds 4.0",
        ),
        (
            "dimension that is true",
            weights(changed(B, shape=[8, True])),
            "shape holds true",
        ),
        ("dimension as a text", weights(changed(B, shape=["4", 2])), "shape holds"),
        (
            "dimension that is NaN",
            weights(text("[4, 2]", "[NaN, 2]")),
            "NaN is no JSON number",
        ),
        (
            "dimension beyond all floats",
            weights(text("[4, 2]", "[1e999, 2]")),
            "beyond what",
        ),
        (
            "dimension of 5000 digits",
            weights(text("[4, 2]", f"[{'9' * 5000}]")),
            "not JSON",
        ),
        (
            "dimensions whose product is 2**64",
            weights(changed(B, shape=[1 << 32, 1 << 32])),
            "more than 2**40 elements",
        ),
        (
            "overflow hidden by a zero",
            weights(
                more(
                    "t",
                    {
                        "dtype": "F32",
                        "shape": [1 << 33, 1 << 33, 0],
                        "data_offsets": [64, 64],
                    },
                )
            ),
            "more than 2**40 elements",
        ),
        (
            "negative offset",
            weights(changed(A, data_offsets=[-32, 0])),
            "data_offsets holds -32",
        ),
        (
            "offsets beyond 2**63",
            weights(changed(B, data_offsets=[1 << 63, (1 << 63) + 32])),
            "2**63 or more",
        ),
        ("three offsets", weights(changed(B, data_offsets=[32, 48, 64])), "has 3 numbers"),
        ("dtype that is NaN", weights(text('"F32"', "NaN")), "NaN is no JSON number"),
        ("dtype nobody knows", weights(changed(B, dtype="PICKLE")), "is unknown"),
        ("dtype that is a list", weights(changed(B, dtype=["F32"])), "is unknown"),
        (
            "ten thousand dimensions",
            weights(changed(B, shape=[4, 2] + [1] * 10_000)),
            "has 10002 dimensions",
        ),
    ),
    *rows(
        "adapter",
        "validate: LH020",
        "28 floods",
        ("sixty thousand empty tensors", weights(flood(60_000)), "at most"),
        (
            "nested a hundred thousand deep",
            weights(safetensors(b'{"t":' + b"[" * 100_000 + b"]" * 100_000 + b"}")),
            "32 levels",
        ),
        (
            "nested in fifty thousand objects",
            weights(safetensors(b'{"a":' * 50_000 + b"1" + b"}" * 50_000)),
            "malformed",
        ),
        (
            "four megabytes of quotes",
            weights(safetensors(b'{"' + b'\\"' * 2_000_000 + b'"}')),
            "malformed",
        ),
    ),
    *rows(
        "adapter",
        "validate: LH020",
        "29 names",
        ("name that is empty", weights(more("")), "name is empty"),
        ("name that runs backwards", weights(more(f"{A}\u202e")), "cannot be seen"),
        ("name with a zero-width space", weights(more(f"{A}\u200b")), "cannot be seen"),
        ("name with NUL", weights(more(f"{A}\0")), "cannot be seen"),
        (
            "name with an escape sequence",
            weights(more("\x1b]0;owned\x07")),
            "cannot be seen",
        ),
        ("name with half a surrogate", weights(more("a\ud800")), "half of a surrogate"),
        ("name of a megabyte", weights(more("n" * (1 << 20))), "at most 1024 are read"),
    ),
    *rows(
        "adapter",
        "validate: LH021",
        "29 names",
        ("name that is a path", weights(more("../../etc/passwd")), "../../etc/passwd"),
        ("name that is an absolute path", weights(more("/etc/passwd")), "/etc/passwd"),
        (
            "name of an attribute of Python",
            weights(more("__class__.__init__")),
            "__class__",
        ),
        (
            "name in other letters that look alike",
            weights(more(A.replace("model", "m\u043edel"))),
            "del",
        ),
    ),
    *rows(
        "adapter",
        "validate: LH020",
        "fact 6 spelling",
        (
            "space before the brace",
            weights(safetensors(b"  " + json.dumps(entries()).encode())),
            "does not begin with",
        ),
        (
            "byte order mark",
            weights(safetensors(b"\xef\xbb\xbf" + json.dumps(entries()).encode())),
            "does not begin with",
        ),
        (
            "NUL behind the header",
            weights(safetensors(json.dumps(entries()).encode() + b"\0\0")),
            "does not end with",
        ),
        ("comment in the header", weights(text("{", "{/* */")), "not JSON"),
        (
            "comma too many",
            weights(safetensors(json.dumps(entries()).encode()[:-1] + b",}")),
            "not JSON",
        ),
        (
            "second object behind the first",
            weights(safetensors(json.dumps(entries()).encode() + b" {}")),
            "not JSON",
        ),
        (
            "header that is not UTF-8",
            weights(
                safetensors(json.dumps(entries()).encode().replace(b"lora_A", b"lora\xff"))
            ),
            "not UTF-8",
        ),
        (
            "header in UTF-16",
            weights(safetensors(json.dumps(entries()).encode("utf-16"))),
            "does not begin with",
        ),
        ("field nobody knows", weights(changed(B, strides=[1, 4])), "'strides' is unknown"),
        (
            "metadata that is no text",
            weights(text("{", '{"__metadata__": {"a": {}}, ')),
            "is an object",
        ),
    ),
    *rows(
        "adapter",
        "validate: LH021",
        "28 floods",
        ("well-formed file of 60 GB, all hole", hole, "bytes"),
    ),
)
